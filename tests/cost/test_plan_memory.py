from dataclasses import replace

import pytest

from megatron_mosaic.cluster.shipped import load_cluster
from megatron_mosaic.cost.cost_model import CostModel
from megatron_mosaic.cost.memory import module_parts, stages_memory
from megatron_mosaic.cost.plan_memory import (
    TERMS,
    samples_per_task,
)
from megatron_mosaic.cost.sizes import ParallelSizes, TrainingSettings
from megatron_mosaic.model.layers import Layer, Mlp, SelfAttention
from megatron_mosaic.model.spec import (
    LanguageHead,
    LayerRun,
    ModelSpec,
    ModuleSpec,
    Patches,
    Projector,
    TokenEmbedding,
)
from megatron_mosaic.model.tokens import Distribution
from megatron_mosaic.schedule.graph import Stage
from tests.schedule.plans import place, plan_of

LAYER = Layer(
    mixer=SelfAttention(num_heads=8, num_query_groups=8, head_dim=64),
    mlp=Mlp(ffn_hidden_size=1024),
)
ONE = Distribution.constant(1)
VISION = ModuleSpec(
    name="vision",
    hidden_size=512,
    layers=(LayerRun(2, LAYER),),
    input=Patches(values=588),
    output=Projector(sizes=(512, 512, 512)),
    items_per_sample=ONE,
    tokens_per_item=Distribution.constant(256),
)
LANGUAGE = ModuleSpec(
    name="language",
    hidden_size=512,
    layers=(LayerRun(4, LAYER),),
    causal=True,
    input=TokenEmbedding(vocab_size=1024),
    output=LanguageHead(vocab_size=1024),
    items_per_sample=ONE,
    tokens_per_item=Distribution.constant(512),
)
MODEL = ModelSpec(
    name="both",
    modules={"vision": VISION, "language": LANGUAGE},
    edges=(("vision", "language"),),
)

FROZEN_VISION = replace(
    MODEL, modules={"vision": replace(VISION, trainable=()), "language": LANGUAGE}
)

CLUSTER = load_cluster("h100")


def one_stage(module, *, samples, pp=1, stage=0, **options):
    common = {"sizes": ParallelSizes(pp=pp), "settings": TrainingSettings()}
    parts = module_parts(module, samples=samples, **common, **options)
    return stages_memory(parts, **common)[stage]


def test_plan_memory_adds_up_what_shares_a_rank():
    plan = plan_of(
        "colocated", place("vision", 0), place("language", 0), num_microbatches=4, group=2
    )

    (hosted, terms), *others = CostModel(MODEL, CLUSTER).plan_memory(plan).items()

    vision = one_stage(VISION, samples=2)
    language = one_stage(LANGUAGE, samples=1, gradient_arrives=True)
    assert not others
    assert hosted == (Stage("language", 0), Stage("vision", 0))
    assert tuple(terms) == TERMS
    assert terms["weights"] == vision.weights + language.weights
    assert terms["working"] == max(vision.working, language.working)
    # One group of the encoder and one microbatch of the language model are live.
    assert terms["activations"] == vision.activations_per_task + language.activations_per_task


def test_plan_memory_holds_what_the_schedule_keeps_alive():
    plan = plan_of(
        "1f1b",
        place("vision", 0),
        place("language", 1, 2, pp=2),
        num_microbatches=8,
    )

    memory = CostModel(MODEL, CLUSTER).plan_memory(plan)

    vision = one_stage(VISION, samples=1)
    first = one_stage(LANGUAGE, samples=1, pp=2, gradient_arrives=True)
    # Three stages in all: the encoder holds three microbatches, the next one two.
    assert memory[(Stage("vision", 0),)]["activations"] == 3 * vision.activations_per_task
    assert memory[(Stage("language", 0),)]["activations"] == 2 * first.activations_per_task


def test_plan_memory_of_idle_ranks_is_not_listed():
    plan = plan_of("1f1b", place("language", 0), num_microbatches=2, world_size=2)
    model = ModelSpec(name="alone", modules={"language": LANGUAGE})

    assert list(CostModel(model, CLUSTER).plan_memory(plan)) == [(Stage("language", 0),)]


@pytest.mark.parametrize(("group", "expected"), [(None, 8), (2, 2)])
def test_samples_of_an_encoder_task_are_those_of_its_group_of_microbatches(group, expected):
    # Eight microbatches of a sample for each of two replicas, on two encoders.
    plan = plan_of(
        "colocated",
        place("vision", 0, 1, dp=2),
        place("language", 0, 1, dp=2),
        num_microbatches=8,
        group=group,
    )

    assert samples_per_task(plan, "vision") == expected
    assert samples_per_task(plan, "language") == 1


def test_samples_of_the_fullest_replica_are_those_of_the_task():
    # Five samples of five replicas on two encoders: one of them has three.
    plan = plan_of(
        "1f1b",
        place("vision", 5, 6, dp=2),
        place("language", *range(5), dp=5),
        num_microbatches=4,
    )

    assert samples_per_task(plan, "vision") == 3


@pytest.mark.parametrize(
    ("ahead", "first", "last"),
    [
        # On the first rank two microbatches of language are live when rows of one wait at most:
        # vF0 F0 vF1 F1 vF2 B0 vF3 F2 B1 ... On the last one: vF0 vF1 F0 B0 F1 B1 ...
        (False, (2, 2), (1, 2)),
        # Rows of all four microbatches are there when the step begins. F0 F1 vF0 vF1 B0 ... take
        # two of them and make two of the next step; vF0 F0 B0 F1 B1 ... make one first.
        (True, (2, 4), (1, 5)),
    ],
)
def test_plan_memory_holds_rows_of_a_frozen_encoder_until_they_are_taken(ahead, first, last):
    place_vision = place("vision", 0, 1, dp=2, trainable=())
    places = place_vision, place("language", 0, 1, pp=2)
    plan = plan_of("bubble_fill", *places, num_microbatches=4, ahead=ahead)
    costs = CostModel(FROZEN_VISION, CLUSTER)
    language = [stage.memory for stage in costs.plan_stages(plan)["language"]]

    memory = costs.plan_memory(plan).values()

    # 256 tokens of a microbatch, 512 numbers of 2 bytes each.
    rows_bytes = 256 * 512 * 2
    assert [terms["activations"] for terms in memory] == [
        tasks * stage.activations_per_task + rows * rows_bytes
        for stage, (tasks, rows) in zip(language, (first, last), strict=True)
    ]


def test_plan_memory_of_ranks_of_a_frozen_encoder_ahead_holds_rows_of_two_steps():
    vision = place("vision", 2, trainable=())
    places = vision, place("language", 0, 1, pp=2)
    plan = plan_of("bubble_fill", *places, num_microbatches=4, group=2, ahead=True)

    memory = CostModel(FROZEN_VISION, CLUSTER).plan_memory(plan)

    # Nothing on the rank says when language takes rows: four microbatches of this step, and four
    # of the next, of 256 tokens of 512 numbers of 2 bytes each.
    assert memory[(Stage("vision", 0),)]["activations"] == 8 * 256 * 512 * 2
