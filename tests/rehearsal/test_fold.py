from dataclasses import replace

import pytest

from megatron_mosaic.errors import PlanError
from megatron_mosaic.layout.plan import Plan
from megatron_mosaic.rehearsal.fold import fold, part_of
from megatron_mosaic.schedule.build import build_schedule
from megatron_mosaic.schedule.order import write_order

# Stages of two ranks each on 0-7 and 8-15; an encoder replica on every pair of them.
SHARED = Plan.loads(
    """
format: 1
world_size: 16
global_batch_size: 32
micro_batch_size: 1
modules:
  vision: {ranks: 0-15, tensor_model_parallel_size: 2, data_parallel_size: 8}
  language: {ranks: 0-15, tensor_model_parallel_size: 2, data_parallel_size: 4,
    pipeline_model_parallel_size: 2}
edges: [[vision, language]]
schedule: {kind: bubble_fill, encoder_group: 2}
""",
    where="shared",
)
APART = Plan.loads(
    """
format: 1
world_size: 12
global_batch_size: 16
micro_batch_size: 1
modules:
  vision: {ranks: 8-11, data_parallel_size: 4}
  language: {ranks: 0-7, data_parallel_size: 4, pipeline_model_parallel_size: 2}
edges: [[vision, language]]
schedule: {kind: 1f1b}
""",
    where="apart",
)


def test_plan_that_is_small_enough_stays_as_it_is():
    assert fold(SHARED, max_ranks=16, where="plan").notes == ("4 of 8 microbatches of a step",)
    assert fold(replace(SHARED, global_batch_size=16), max_ranks=16, where="plan").notes == ()


def test_half_of_the_replicas_stay_on_the_ranks_that_they_share():
    half = part_of(SHARED, 2)

    # Language replicas 0 and 1 are on 0-3 and 8-11, with half of the encoder's eight.
    assert half is not None
    assert half.world_size == 8
    assert half.language.ranks == (0, 1, 2, 3, 4, 5, 6, 7)
    assert half.language.shape == (2, 1, 2, 2)
    assert half.modules["vision"].ranks == (0, 1, 2, 3, 4, 5, 6, 7)
    assert half.modules["vision"].data_parallel_size == 4
    assert half.num_microbatches == SHARED.num_microbatches


def test_half_of_the_replicas_of_modules_on_ranks_of_their_own():
    half = part_of(APART, 2)

    # Of language ranks 0-7, stages 0-3 and 4-7, stay 0, 1, 4, 5; of vision 8 and 9.
    assert half is not None
    assert half.language.ranks == (0, 1, 2, 3)
    assert half.modules["vision"].ranks == (4, 5)


def test_order_of_tasks_stays_with_the_ranks_that_are_left():
    order = write_order(SHARED, build_schedule(SHARED))
    ordered = replace(SHARED, schedule=replace(SHARED.schedule, order=order))
    half = part_of(ordered, 2)

    # Stages on 0-7 and 8-15 become those on 0-3 and 4-7; steps have as many microbatches.
    assert [ranks for ranks, _ in order] == ["0-7", "8-15"]
    assert half is not None
    assert half.schedule.order == (("0-3", order[0][1]), ("4-7", order[1][1]))
    assert fold(ordered, max_ranks=8, where="plan").plan == half


def test_adapters_that_only_the_script_knows_are_left_out():
    language = replace(SHARED.language, trainable=("*lora_*",))
    plan = replace(SHARED, global_batch_size=16, modules={**SHARED.modules, "language": language})
    folded = fold(plan, max_ranks=16, where="plan")

    assert folded.plan.language.trainable is None
    assert folded.notes == ("language as if all of it trained, not ['*lora_*']",)


def test_fold_says_what_it_leaves_out():
    folded = fold(APART, max_ranks=8, where="plan")

    assert folded.plan.world_size == 6
    assert folded.notes == ("one of 2 equal parts of the data-parallel replicas: 6 of 12 ranks",)


def test_two_replicas_stay_of_a_module_that_had_several():
    with pytest.raises(PlanError, match=r"world_size=12 must fold to <= 3 ranks.* --ranks 6"):
        fold(APART, max_ranks=3, where="plan")


def test_replicas_that_cross_the_cut_are_not_folded():
    # Each replica of the encoder has a rank of language replicas 0 or 1, and one of 2 or 3.
    vision = replace(SHARED.modules["vision"], data_parallel_size=4, ranks=(0, 4, 1, 5, 2, 6, 3, 7))
    crossed = replace(SHARED, modules={"language": SHARED.language, "vision": vision})

    assert part_of(crossed, 2) is None


def test_deep_modules_become_thin_and_stay_uneven():
    deep = replace(
        SHARED,
        global_batch_size=16,
        modules={
            "vision": SHARED.modules["vision"],
            "language": replace(SHARED.language, layers_per_stage=(30, 50)),
        },
    )
    folded = fold(deep, max_ranks=16, where="plan")

    # 80 layers at 2.5 to one: 30 / 2.5 and 50 / 2.5.
    assert folded.plan.language.layers_per_stage == (12, 20)
    assert folded.notes == ("32 of 80 layers of language, [12, 20] in its stages",)
