"""Where the planner puts the tokens of long sequences and the items of encoders."""

from dataclasses import replace

import pytest

from megatron_mosaic.errors import PlanError
from megatron_mosaic.layout.attention import AttentionPlan
from megatron_mosaic.layout.plan import Plan
from megatron_mosaic.model.tokens import Distribution
from megatron_mosaic.planner.explanation import as_document, explain
from megatron_mosaic.planner.planner import make_plan
from megatron_mosaic.planner.problem import read_pins
from tests.planner.problems import encoder, language, model, problem

IMAGES = Distribution.of_weights([0, 2, 8], [2, 3, 1])
SIZES = Distribution.of_weights([256, 1024, 4096], [2, 2, 1])
DOCUMENTS = Distribution.of_weights([1000, 8000, 30000], [4, 3, 1])


def unlike_items(**encoder_options):
    vision = encoder("vision", **encoder_options)
    return replace(vision, items_per_sample=IMAGES, tokens_per_item=SIZES)


def packed(tokens=65536):
    whole = model(unlike_items(), language=language(tokens=tokens))
    text = replace(
        whole.modules["language"], mask="multimodal_packed", tokens_per_document=DOCUMENTS
    )
    return replace(whole, modules={**whole.modules, "language": text})


def answer_of(asked_model, *, gpus=8, batch=8, **pins):
    asked = problem(asked_model, gpus, batch)
    written = {name.replace("__", "."): str(value) for name, value in pins.items()}
    return make_plan(replace(asked, pins=read_pins(written, model=asked_model)))


@pytest.fixture(scope="module")
def long_sequences():
    return answer_of(packed(), language__context_parallel_size=4)


def test_packed_sequences_are_split_by_cost_and_the_plan_says_so(long_sequences):
    attention = long_sequences.choice.plan.language.attention

    assert attention is not None
    assert attention.mask == "multimodal_packed"
    assert attention.tokens in ("balanced", "local")
    assert attention.keys in ("blocks", "all_gather")
    written = long_sequences.plan().to_yaml()
    assert Plan.loads(written, where="plan.yaml").language.attention == attention
    (sentence,) = [s for s in explain(long_sequences).sentences if "zigzag would leave" in s]
    assert sentence.startswith("Under the mask multimodal_packed tokens are")


def test_no_answer_is_slower_than_zigzag_in_the_same_layout(long_sequences):
    zigzag = answer_of(
        packed(), language__context_parallel_size=4, language__attention__tokens="zigzag"
    )

    assert zigzag.choice.plan.language.attention.tokens == "zigzag"
    assert long_sequences.choice.step_s < zigzag.choice.step_s
    assert long_sequences.choice.step_s <= long_sequences.baseline.step_s
    waits = [each.choice.step.breakdown.imbalance_s for each in (long_sequences, zigzag)]
    assert waits[0] < waits[1] / 4


def test_sequences_of_one_rank_have_the_mask_alone():
    answer = answer_of(packed(8192), gpus=2, language__context_parallel_size=1)

    assert answer.choice.plan.language.attention == AttentionPlan(mask="multimodal_packed")


def test_context_parallelism_is_chosen_where_sequences_do_not_fit_without():
    answer = answer_of(packed(262144), gpus=16, batch=4)

    assert answer.choice.candidate.language.cp > 1
    assert answer.choice.step.breakdown.imbalance_s < 0.05 * answer.choice.step_s


def test_unlike_items_are_balanced_where_that_is_faster():
    answer = answer_of(model(unlike_items(hidden=2048, layers=12, trainable=None)), batch=32)
    sizes = answer.choice.candidate.encoders[0].sizes

    assert sizes.dp > 1
    assert answer.choice.plan.modules["vision"].items == "balanced"
    in_order = answer_of(
        model(unlike_items(hidden=2048, layers=12, trainable=None)),
        batch=32,
        vision__items="in_order",
        vision__data_parallel_size=sizes.dp,
    )
    assert answer.choice.step_s < in_order.choice.step_s
    assert in_order.choice.step.breakdown.imbalance_s > answer.choice.step.breakdown.imbalance_s
    document = as_document(explain(answer))
    assert document["best"][0]["modules"]["vision"]["items"] == "balanced"
    assert any(s.startswith("Items of vision go to its") for s in document["why"])


def test_equal_items_stay_in_order():
    answer = answer_of(model(encoder("vision")), batch=16)

    assert answer.choice.plan.modules["vision"].items == "in_order"
    assert answer.choice.plan.language.attention is None
    assert "imbalance_s" not in answer.plan().predicted["breakdown"]


def test_pins_of_tokens_and_items_are_words_of_the_right_module():
    for written, message in (
        ({"language.attention.tokens": "zig"}, r"language\.attention\.tokens='zig' must be one of"),
        ({"vision.attention.keys": "blocks"}, r"vision\.attention\.keys must be a field of lang"),
        ({"language.items": "balanced"}, r"language\.items must be a field of an encoder"),
    ):
        with pytest.raises(PlanError, match=message):
            read_pins(written, model=packed())
    with pytest.raises(PlanError, match=r"attention\.tokens must go with a mask in model small"):
        read_pins({"language.attention.tokens": "local"}, model=model(encoder("vision")))


def test_masks_go_with_full_attention_alone():
    whole = packed()
    (run,) = whole.language.layers
    layer = replace(run.layer, mixer=replace(run.layer.mixer, window=1024))
    windows = replace(whole.language, layers=(run._replace(layer=layer),))

    with pytest.raises(PlanError, match="mask=multimodal_packed must go with layers of full self-"):
        problem(replace(whole, modules={**whole.modules, "language": windows}), 8, 8)
