"""Loads of context-parallel ranks under multimodal masks, and of encoders' replicas."""

from dataclasses import replace

import numpy as np
import pytest
import yaml

from megatron_mosaic.cluster.shipped import load_cluster
from megatron_mosaic.cost.collectives import Group
from megatron_mosaic.cost.context import ContextTask, context_loads
from megatron_mosaic.cost.cost_model import CostModel
from megatron_mosaic.cost.exposed import keys_s
from megatron_mosaic.cost.imbalance import DrawnItems
from megatron_mosaic.cost.sizes import ParallelSizes
from megatron_mosaic.errors import PlanError
from megatron_mosaic.layout.plan import Plan
from megatron_mosaic.model.model_file import parse_model, write_model
from megatron_mosaic.model.tokens import Distribution
from megatron_mosaic.model.workload import ItemRows, Workload, draw_masks
from tests.planner.problems import encoder, language, model

CAUSAL = Workload(mask="causal", length=Distribution.constant(8192))
PACKED = Workload(
    mask="multimodal_packed",
    length=Distribution.constant(16384),
    documents=Distribution.of_weights([500, 2000, 8000], [1, 1, 1]),
    items=(ItemRows(Distribution.constant(4), Distribution.of_weights([512, 2048], [1, 1]), 4),),
)
EIGHT = Group.of(load_cluster("h100", num_gpus=8), size=8, stride=1)


def unlike(module, *, numbers=(0, 1, 2, 8), tokens=(256, 1024, 4096)):
    return replace(
        module,
        items_per_sample=Distribution.of_weights(numbers, [1] * len(numbers)),
        tokens_per_item=Distribution.of_weights(tokens, [1] * len(tokens)),
    )


def packed_model(*, tokens=16384):
    whole = model(unlike(encoder("vision")), language=language(tokens=tokens))
    modules = dict(whole.modules)
    modules["language"] = replace(
        modules["language"], mask="multimodal_packed", tokens_per_document=PACKED.documents
    )
    return replace(whole, modules=modules)


def test_causal_sequences_are_equal_loads_in_zigzag_and_not_one_after_the_other():
    # Of 64 rows of tiles rank i of 4 has 8 from the front and 8 from the back: 8 * 65 of them.
    loads = context_loads(CAUSAL, cp=4, method="zigzag")

    assert loads.imbalance == 1.0
    np.testing.assert_array_equal(loads.pairs, 520 * 128 * 128)
    # The last of them has rows 49 to 64, 16 * 56.5 of 2080 tiles, and the mean is 520.
    contiguous = context_loads(CAUSAL, cp=4, method="contiguous")
    assert contiguous.imbalance == pytest.approx(904 / 520)


def test_one_rank_computes_all_tiles_and_receives_nothing():
    task = context_loads(CAUSAL, cp=1, method="balanced").of_microbatch(2)

    # Twice 64 * 65 / 2 tiles.
    assert task.pairs == task.mean_pairs == 2 * 2080 * 128**2
    assert (task.tokens, task.received, task.own_share, task.wait_share) == (16384, 0, 1, 0)


def test_balanced_tokens_are_never_slower_than_zigzag_and_equally_many():
    for cp in (2, 4, 8):
        balanced = context_loads(PACKED, cp=cp, method="balanced").of_microbatch(1)
        zigzag = context_loads(PACKED, cp=cp, method="zigzag").of_microbatch(1)
        assert balanced.mean_pairs == pytest.approx(zigzag.mean_pairs)
        assert balanced.pairs < zigzag.pairs
        assert balanced.tokens == 16384 / cp


def test_local_tokens_need_fewer_keys_of_others_than_balanced_ones():
    local = context_loads(PACKED, cp=4, method="local")
    balanced = context_loads(PACKED, cp=4, method="balanced")

    assert local.received < balanced.received
    assert local.own_share > balanced.own_share


def test_larger_microbatches_even_out_what_ranks_compute():
    loads = context_loads(PACKED, cp=4, method="zigzag")

    waits = [loads.of_microbatch(samples).wait_share for samples in (1, 2, 4, 8)]
    assert waits == sorted(waits, reverse=True)


def test_drawn_sequences_are_the_same_every_time_and_have_their_documents_and_items():
    (first, *_), (again, *_) = draw_masks(PACKED, count=2), draw_masks(PACKED, count=2)

    assert first.length == 16384
    assert first.segments() == again.segments()
    # Four images of 512 / 4 or 2048 / 4 rows, in documents of at most 8000 tokens.
    images = [each for each in first.segments() if each.group >= 0]
    assert len(images) == 4
    assert {each.length for each in images} <= {128, 512}
    lengths = np.bincount(
        [s.document for s in first.segments()], [s.length for s in first.segments()]
    )
    assert set(lengths[:-1]) <= {500, 2000, 8000}


def test_keys_take_the_faster_way_on_their_own():
    def seconds(received, kind):
        task = ContextTask(
            pairs=1, mean_pairs=1, tokens=1024, length=8192, all_pairs=1, received=received,
            own_share=0.5,
        )  # fmt: skip
        return keys_s(task, EIGHT, kind=kind, token_bytes=4096)

    # An all-gather brings 7 * 1024 tokens over 7 steps; blocks of all of them need one latency.
    assert seconds(100, "blocks") < seconds(7168, "blocks")
    assert seconds(100, "all_gather") == seconds(7168, "all_gather")
    for received in (0, 100, 7168):
        ways = [seconds(received, kind) for kind in ("blocks", "all_gather")]
        assert seconds(received, "auto") == min(ways)
    assert seconds(0, "blocks") == 0.0


def test_imbalance_of_tokens_is_in_the_time_of_a_layer():
    costs = CostModel(packed_model(tokens=65536), load_cluster("h100", num_gpus=8))

    def layer(tokens):
        sizes = ParallelSizes(cp=4, tokens=tokens)
        return costs.module("language", sizes, samples=1).layers[0].costs

    zigzag, balanced = layer("zigzag"), layer("balanced")
    computed = [it.forward_s - it.forward_communication_s for it in (zigzag, balanced)]
    assert computed[0] > computed[1]
    assert zigzag.forward_imbalance_s > 10 * balanced.forward_imbalance_s
    assert zigzag.backward_imbalance_s > zigzag.forward_imbalance_s
    # Keys of others stay until the backward pass.
    assert balanced.activation_bytes > zigzag.activation_bytes


def test_costs_without_a_mask_do_not_depend_on_how_tokens_would_be_assigned():
    costs = CostModel(model(language=language(tokens=16384)), load_cluster("h100", num_gpus=8))

    first, second = (
        costs.module("language", ParallelSizes(cp=4, tokens=tokens), samples=1).layers
        for tokens in ("zigzag", "balanced")
    )
    assert first == second
    assert first[0].costs.forward_imbalance_s == 0.0


def test_replicas_with_samples_of_their_own_wait_for_the_slowest():
    # Every second sample has two images, the others none: of two replicas with a sample each,
    # one has both images in half of the tasks, else both have the same. Tasks that are empty
    # count nothing: the slowest has (0.25 * 2 + 0.5 * 2) / 1 = 1.5 of the mean.
    module = unlike(encoder("vision"), numbers=(0, 2), tokens=(256,))
    drawn = DrawnItems.of(module)

    assert drawn.imbalance(num_samples=2, dp=2, items="in_order") == pytest.approx(1.5, rel=0.02)
    # One of the two images each, however they fall.
    assert drawn.imbalance(num_samples=2, dp=2, items="balanced") == pytest.approx(1.0)


def test_imbalance_of_items_grows_with_replicas_and_shrinks_with_samples():
    drawn = DrawnItems.of(unlike(encoder("vision")))

    in_order = [drawn.imbalance(num_samples=64, dp=dp, items="in_order") for dp in (1, 4, 16, 64)]
    assert in_order[0] == 1.0
    assert in_order == sorted(in_order)
    longer = [drawn.imbalance(num_samples=n, dp=16, items="in_order") for n in (16, 64, 256)]
    assert longer == sorted(longer, reverse=True)
    for num_samples in (64, 256):
        balanced = drawn.imbalance(num_samples=num_samples, dp=16, items="balanced")
        assert balanced < drawn.imbalance(num_samples=num_samples, dp=16, items="in_order")


def test_work_of_an_item_is_what_its_layers_compute():
    module = unlike(encoder("vision", hidden=1024, layers=6, heads=16), numbers=(1,), tokens=(100,))
    module = replace(module, output=None, input=None)

    # 24 * 1024^2 FLOPs of a token's multiplications and 4 * 1024 of each pair, in 6 layers.
    assert DrawnItems.of(module).work[0] == 100 * 6 * (24 * 1024**2 + 4 * 1024 * 100)


def test_imbalance_of_items_is_in_the_time_of_an_encoder():
    costs = CostModel(packed_model(), load_cluster("h100", num_gpus=8))

    def part(items, dp):
        sizes = ParallelSizes(dp=dp, items=items)
        return costs.module("vision", sizes, samples=4).layers[0].costs

    alone, slowest, even = part("in_order", 1), part("in_order", 8), part("balanced", 8)
    imbalance = costs.imbalance("vision", ParallelSizes(dp=8), samples=4)
    assert slowest.forward_s == pytest.approx(imbalance * alone.forward_s)
    assert slowest.forward_imbalance_s == pytest.approx((imbalance - 1) * alone.forward_s)
    assert alone.forward_s < even.forward_s < slowest.forward_s


def test_model_files_name_masks_and_documents_and_give_them_back():
    written = write_model(packed_model())

    assert "mask: multimodal_packed" in written
    assert parse_model(written, where="model.yaml") == packed_model()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"mask": None}, r"language: tokens_per_document must go with mask"),
        ({"tokens_per_document": None}, r"tokens_per_document must be given with mask=multimodal"),
        ({"mask": "prefix"}, r"mask='prefix' must be one of causal, prefix_lm"),
        ({"mask": "encoder_embedded"}, r"tokens_per_document must be absent with mask=encoder_emb"),
        ({"tokens_per_document": 0}, r"tokens_per_document=0 must be >= 1"),
    ],
)
def test_model_files_refuse_masks_and_documents_that_contradict(keys, message):
    document = yaml.safe_load(write_model(packed_model()))
    written = {**document["modules"]["language"], **keys}
    document["modules"]["language"] = {k: v for k, v in written.items() if v is not None}

    with pytest.raises(PlanError, match=message):
        parse_model(yaml.safe_dump(document), where="model.yaml")


def test_masks_of_plan_and_model_must_agree():
    plan = Plan.loads(
        "format: 1\nworld_size: 1\nglobal_batch_size: 2\nmicro_batch_size: 1\n"
        "modules:\n  vision: {ranks: [0], trainable: [projector]}\n"
        "  language: {ranks: [0], attention: {mask: prefix_lm}}\n"
        "edges: [[vision, language]]\nschedule: {kind: no_pipelining}\n",
        where="plan.yaml",
    )

    with pytest.raises(
        PlanError, match=r"attention\.mask=prefix_lm must be multimodal_packed as in"
    ):
        CostModel(packed_model(), load_cluster("h100", num_gpus=1)).estimate(plan)
