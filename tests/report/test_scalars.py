import pytest

from megatron_mosaic.layout.plan import Plan
from megatron_mosaic.report.deviation import StepTerms
from megatron_mosaic.report.prediction import read_prediction
from megatron_mosaic.report.scalars import (
    RankStep,
    Totals,
    largest_of,
    scalars_of,
    sums_of,
    terms_of,
)
from megatron_mosaic.schedule.graph import Stage
from megatron_mosaic.schedule.plan_program import program_of_plan
from megatron_mosaic.schedule.simulate import PassTimes

# Vision on rank 0, language on rank 1, nothing on rank 2; two microbatches are one encoder task.
PLAN = """
format: 1
world_size: 3
global_batch_size: 2
micro_batch_size: 1
modules:
  vision: {ranks: 0, trainable: []}
  language: {ranks: 1}
edges: [[vision, language]]
schedule: {kind: colocated, encoder_group: 2}
predicted: {peak_flops_per_s: 100.0}
"""
VISION = RankStep(
    step_s=10.0,
    walk_s=6.0,
    close_s=9.0,
    busy_s=3.0,
    passes_s={Stage("vision", 0): PassTimes(3.0, 0.0)},
    memory_bytes=7.0,
    received_bytes={"vision": 0},
)
LANGUAGE = RankStep(
    step_s=10.0,
    walk_s=8.0,
    close_s=9.0,
    busy_s=4.0,
    passes_s={Stage("language", 0): PassTimes(1.0, 3.0)},
    memory_bytes=5.0,
    received_bytes={"vision": 64},
)
IDLE = RankStep(10.0, 0.0, 9.0, 0.0, {}, 9.0, {})


@pytest.fixture
def plan():
    return Plan.loads(PLAN, where="plan")


@pytest.fixture
def totals(plan):
    """What an all-reduce makes of the three ranks."""
    ranks = list(enumerate((VISION, LANGUAGE, IDLE)))
    sums = [sums_of(plan, own, rank=rank) for rank, own in ranks]
    largest = [largest_of(plan, own, rank=rank) for rank, own in ranks]
    assert len({tuple(names) for names in sums}) == len({tuple(names) for names in largest}) == 1
    return Totals(
        {name: sum(own[name] for own in sums) for name in sums[0]},
        {name: max(own[name] for own in largest) for name in largest[0]},
    )


def test_terms_are_those_of_the_rank_that_works_longest(plan, totals):
    terms = terms_of(plan, program_of_plan(plan), totals)

    # Tasks of a step without transfers: 3 s of vision, then 4 s of language. The walk takes 8 s.
    assert terms == StepTerms(
        step_s=10.0,
        compute_s=4.0,
        communication_s=1.0,
        bubble_s=3.0,
        sync_s=1.0,
        optimizer_s=1.0,
        modules_s={"language": 4.0, "vision": 3.0},
    )


def test_scalars_of_a_module_are_of_the_ranks_that_host_it(plan, totals):
    scalars = scalars_of(
        plan,
        totals,
        terms=terms_of(plan, program_of_plan(plan), totals),
        step_s=10.0,
        flops={"language": 200.0, "vision": 90.0},
        prediction=read_prediction(plan),
        predicted=None,
    )

    of_vision = {
        name.removeprefix("mosaic/vision/"): value
        for name, value in scalars.items()
        if name.startswith("mosaic/vision/")
    }
    # Vision waits for 3 of 6 s, and has 90 FLOPs in 3 s of 100 FLOP/s; 64 bytes left it.
    assert of_vision == pytest.approx(
        {
            "flops": 90,
            "time": 3.0,
            "bubble": 0.5,
            "boundary-bytes": 64,
            "memory-bytes": 7.0,
            "mfu": 0.3,
        }
    )
    # 290 FLOPs in 10 s on three GPUs, one of which idles; waits are of the two that work.
    assert scalars["mosaic/mfu"] == pytest.approx(290 / 10 / 3 / 100)
    assert scalars["mosaic/bubble"] == pytest.approx(0.5)
    assert scalars["mosaic/memory-bytes"] == 7.0


def test_plan_without_a_prediction_has_no_predicted_scalars(plan, totals):
    scalars = scalars_of(
        plan,
        totals,
        terms=terms_of(plan, program_of_plan(plan), totals),
        step_s=10.0,
        flops={},
        prediction=read_prediction(plan),
        predicted=None,
    )

    assert [name for name in scalars if name.endswith("-predicted")] == []
