import dataclasses

import pytest

from megatron_mosaic.errors import LayoutError
from megatron_mosaic.layout.model_facts import ModuleFacts, check_module
from megatron_mosaic.layout.placement import ModulePlacement
from megatron_mosaic.layout.plan import Plan, ScheduleChoice

LANGUAGE = ModuleFacts(
    num_layers=32,
    num_attention_heads=32,
    num_query_groups=8,
    hidden_size=4096,
    ffn_hidden_size=14336,
    vocab_size=128256,
    sequence_length=4096,
)
VISION = ModuleFacts(
    num_layers=24,
    num_attention_heads=16,
    num_query_groups=16,
    hidden_size=1024,
    ffn_hidden_size=4096,
)


def plan_of(**language):
    language = {"tensor_model_parallel_size": 2, **language}
    num_ranks = language["tensor_model_parallel_size"]
    num_ranks *= language.get("pipeline_model_parallel_size", 1)
    return Plan(
        world_size=num_ranks,
        global_batch_size=8,
        micro_batch_size=1,
        modules={
            "language": ModulePlacement(name="language", ranks=tuple(range(num_ranks)), **language),
            "vision": ModulePlacement(name="vision", ranks=(0,)),
        },
        edges=(("vision", "language"),),
        schedule=ScheduleChoice(kind="colocated"),
    )


def check(plan, **language):
    check_module(plan.modules["language"], dataclasses.replace(LANGUAGE, **language))
    check_module(plan.modules["vision"], VISION)


@pytest.mark.parametrize(
    "language",
    [
        {"tensor_model_parallel_size": 8},
        {"tensor_model_parallel_size": 16},  # two ranks share each of the 8 query groups
        {"pipeline_model_parallel_size": 4},
        {"pipeline_model_parallel_size": 3, "layers_per_stage": (10, 11, 11)},
        {"tensor_model_parallel_size": 4, "sequence_parallel": True},
    ],
    ids=str,
)
def test_check_module_accepts_what_divides(language):
    check(plan_of(**language))


@pytest.mark.parametrize(
    ("placement", "facts", "message"),
    [
        ({}, {"num_attention_heads": 31}, r"size=2 must divide num_attention_heads=31; "),
        ({}, {"ffn_hidden_size": 11}, r"size=2 must divide ffn_hidden_size=11; "),
        ({}, {"vocab_size": 50257}, r"size=2 must divide vocab_size=50257; "),
        (
            {"tensor_model_parallel_size": 4},
            {"num_query_groups": 6},
            r"size=4 must divide num_query_groups=6 or be a multiple of it; ",
        ),
        (
            {"pipeline_model_parallel_size": 3},
            {},
            r"pipeline_model_parallel_size=3 must divide num_layers=32; .* layers_per_stage",
        ),
        (
            {"pipeline_model_parallel_size": 2, "layers_per_stage": (16, 15)},
            {},
            r"layers_per_stage=\[16, 15\] must sum to num_layers=32, not 31; ",
        ),
        (
            {"sequence_parallel": True},
            {"sequence_length": 4095},
            r"sequence_length=4095 must be a multiple of 2, .*; pad",
        ),
    ],
)
def test_check_module_names_what_does_not_divide(placement, facts, message):
    with pytest.raises(LayoutError, match=r"^modules\.language: .*" + message):
        check(plan_of(**placement), **facts)


EXPERTS = {"num_experts": 8, "moe_ffn_hidden_size": 1024}
SPLIT = {"expert_model_parallel_size": 2, "expert_tensor_parallel_size": 1}


def test_check_module_accepts_experts_that_divide():
    check(plan_of(sequence_parallel=True, **SPLIT), **EXPERTS)


@pytest.mark.parametrize(
    ("placement", "facts", "message"),
    [
        (SPLIT, {}, r"expert_model_parallel_size=2 .* num_experts=None; remove"),
        (
            {**SPLIT, "sequence_parallel": True},
            {**EXPERTS, "num_experts": 9},
            r"expert_model_parallel_size=2 must divide num_experts=9; ",
        ),
        (
            {"sequence_parallel": True},
            {**EXPERTS, "moe_ffn_hidden_size": 1023},
            r"expert_tensor_parallel_size=2 must divide moe_ffn_hidden_size=1023; ",
        ),
        (SPLIT, EXPERTS, r"sequence_parallel=false must be true with num_experts=8 and .*size=2; "),
    ],
)
def test_check_module_names_what_experts_do_not_allow(placement, facts, message):
    with pytest.raises(LayoutError, match=r"^modules\.language: .*" + message):
        check(plan_of(**placement), **facts)


def test_check_module_ignores_sequence_length_without_sequence_parallel():
    check(plan_of(), sequence_length=4095)
