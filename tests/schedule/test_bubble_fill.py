from dataclasses import replace
from unittest.mock import patch

import pytest

from megatron_mosaic.errors import PlanError
from megatron_mosaic.layout.plan import Plan
from megatron_mosaic.schedule.build import build_schedule, max_live
from megatron_mosaic.schedule.fill import fill, least_live
from megatron_mosaic.schedule.graph import Stage, stage_order
from megatron_mosaic.schedule.order import write_order
from megatron_mosaic.schedule.plan_program import program_of_plan
from megatron_mosaic.schedule.program import program_of
from megatron_mosaic.schedule.simulate import PassTimes, simulate
from megatron_mosaic.schedule.verify import ScheduleError, verify
from tests.schedule.plans import place, plan_of, table
from tests.schedule.test_simulate import drawn


def shared(num_microbatches=4, **choice):
    """Two replicas of vision on the two ranks of the language model's pipeline."""
    return plan_of(
        "bubble_fill",
        place("vision", 0, 1, dp=2, trainable=() if choice.get("ahead") else None),
        place("language", 0, 1, pp=2),
        num_microbatches=num_microbatches,
        **choice,
    )


def filled(plan, *, vision=(1, 1), language=(1, 2)):
    times = {"vision": PassTimes(*vision), "language": PassTimes(*language)}
    tasks_s = {stage: times[stage.module] for stage in stage_order(plan)}
    schedule = fill(plan, tasks_s=tasks_s)
    verify(plan, schedule)
    return schedule, simulate(program_of(plan, schedule), tasks_s=tasks_s)


def with_order(plan, order):
    with patch("megatron_mosaic.layout.plan.refuse_unsupported"):
        return replace(plan, schedule=replace(plan.schedule, order=tuple(order.items())))


def test_bubble_fill_puts_encoder_tasks_where_the_pipeline_waits():
    _, timeline = filled(shared())

    # Each rank works 4 * (1 + 2 + 1 + 1) = 20 s and never waits.
    assert drawn(timeline) == [
        "vF0 F0 vF1 F1 vF2 B0 B0 vF3 vB0 F2 B1 B1 F3 B2 B2 vB1 B3 B3 vB2 vB3",
        "vF0 vF1 F0 B0 B0 F1 B1 B1 vF2 vF3 F2 B2 B2 F3 B3 B3 vB0 vB1 vB2 vB3",
    ]


def test_bubble_fill_keeps_to_its_bound_of_live_tasks():
    _, timeline = filled(shared(num_microbatches=6, max_live=2))

    assert timeline.program.peak_live(Stage("vision", 0)) == 2
    assert drawn(timeline)[0] == (
        "vF0 F0 vF1 F1 . B0 B0 vB0 vF2 . F2 B1 B1 vB1 vF3 . F3 B2 B2 vB2 vF4 . F4 B3 B3 vB3 vF5 "
        ". F5 B4 B4 vB4 B5 B5 vB5"
    )


def test_bubble_fill_rejects_a_bound_below_what_the_pipeline_has_in_flight():
    plan = plan_of(
        "bubble_fill",
        place("vision", 0, 1, 2, dp=3),
        place("language", 0, 1, 2, pp=3),
        num_microbatches=6,
        max_live=2,
    )

    # Three microbatches are in flight in a pipeline of three stages.
    assert least_live(plan) == 3
    with pytest.raises(PlanError, match=r"^schedule: max_live=2 must be >= 3, the encoder tasks"):
        build_schedule(plan)


def test_bubble_fill_runs_frozen_encoders_a_step_ahead_in_any_gap():
    schedule, timeline = filled(shared(ahead=True))

    assert schedule.ahead == {"vision"}
    # The language model never waits for vision: it ends after (4 + 2 - 1) * 3 s.
    assert drawn(timeline) == [
        "F0 F1 vF0 vF1 B0 B0 F2 B1 B1 F3 B2 B2 vF2 B3 B3 vF3",
        "vF0 F0 B0 B0 F1 B1 B1 F2 B2 B2 F3 B3 B3 vF1 vF2 vF3",
    ]


def test_bubble_fill_places_layer_chunks_one_by_one():
    plan = plan_of(
        "bubble_fill",
        place("vision", 0, 1, dp=2, vpp=2),
        place("language", 0, 1, pp=2),
        num_microbatches=2,
    )
    schedule, _ = filled(plan, vision=(1, 2), language=(3, 6))

    names = [f"{t.module[0]}{t.kind}{t.microbatches[0]}.{t.stage}" for t in schedule.tasks[1]]
    # Rank 1 starts the second microbatch's first chunk while rank 0 runs the language model.
    assert " ".join(names) == (
        "vF0.0 vF0.1 vF1.0 vF1.1 lF0.1 lB0.1 lF1.1 lB1.1 vB0.1 vB0.0 vB1.1 vB1.0"
    )


def test_bubble_fill_runs_ranks_of_one_collective_together():
    plan = plan_of(
        "bubble_fill",
        place("vision", 0, 1, tp=2),
        place("language", 0, 1, pp=2),
        num_microbatches=3,
    )
    schedule, timeline = filled(plan)

    vision = [[t for t in tasks if t.module == "vision"] for tasks in schedule.tasks]
    assert vision[0] == vision[1]
    assert [part.kinds for part in timeline.program.parts if part.stage.module == "vision"] == [
        (0, 1)
    ]


def test_bubble_fill_evaluates_as_colocated():
    plan = shared()
    colocated = plan_of(
        "colocated",
        place("vision", 0, 1, dp=2),
        place("language", 0, 1, pp=2),
        num_microbatches=4,
        group=1,
    )

    assert build_schedule(plan, forward_only=True) == build_schedule(colocated, forward_only=True)
    assert build_schedule(plan, num_microbatches=3) == build_schedule(colocated, num_microbatches=3)


def test_bubble_fill_of_a_plan_without_order_is_simulated_as_it_is_built():
    plan = shared()

    program, built = program_of_plan(plan), build_schedule(plan)
    for kind in program.kinds:
        tasks = tuple(program.task(i) for i in program.tasks_of(kind))
        assert tasks == built.tasks[kind.ranks[0]]


def test_bubble_fill_bounds_each_stage():
    plan = shared(num_microbatches=8, max_live=5)

    assert max_live(plan, Stage("vision", 0), num_microbatches=8) == 5
    assert [max_live(plan, Stage("language", s), num_microbatches=8) for s in (0, 1)] == [2, 1]


def test_verify_rejects_more_live_tasks_than_the_plan_allows():
    loose, tight = shared(num_microbatches=6), shared(num_microbatches=6, max_live=2)

    with pytest.raises(ScheduleError, match=r"live=\d tasks of vision must be <= 2"):
        verify(tight, build_schedule(loose))


def test_order_is_text_for_people():
    plan = shared(num_microbatches=6)

    assert dict(write_order(plan, build_schedule(plan))) == {
        "0": "(vision:F F)*2 vision:F B vision:F*2 (F B)*2 vision:B F B vision:B vision:F vision:B "
        "F (B vision:B)*2 vision:B",
        "1": "(vision:F vision:F F B F B)*2 vision:F vision:B F vision:B B vision:F vision:B F B "
        "vision:B*3",
    }


def test_order_survives_the_plan_file():
    plan = shared(num_microbatches=6)
    built = build_schedule(plan)
    stored = with_order(plan, dict(write_order(plan, built)))

    read = Plan.loads(stored.to_yaml(), "plan.yaml")

    assert read == stored
    assert read.digest() == stored.digest() != plan.digest()
    assert build_schedule(read) == built


def test_order_of_the_plan_is_run_and_not_computed():
    plan = shared(num_microbatches=2)
    written = {
        "0": "(vision:F F)*2 (B vision:B)*2",
        "1": "vision:F*2 (F B)*2 vision:B*2",
    }
    stored = with_order(plan, written)
    verify(stored, build_schedule(stored))

    assert table(build_schedule(stored)) == [
        "vF0 F0 vF1 F1 B0 vB0 B1 vB1",
        "vF0 vF1 F0 B0 F1 B1 vB0 vB1",
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"1": None}, r"^schedule: order=\['0'\] must name the ranks 1, which host the same st"),
        ({"0-1": "F"}, r"^schedule: order key='0-1' must be one of 0, 1; remove it$"),
        ({"0": "vison:F"}, r"^schedule: order\[0\]: task='vison:F' must be one of .*; did you m"),
        ({"0": "F*3"}, r"^schedule: order\[0\]: task=F must stand there 2 times, not more; rem"),
        ({"0": "(F B"}, r"^schedule: order\[0\]: item='\(F' must be a task or tasks in parenth"),
        ({"0": "F*0"}, r"^schedule: order\[0\]: item='F\*0' must be a task or tasks in parenth"),
        ({"0": "F*2000000"}, r"item='F\*2000000' must lead to <= 1000000 tasks; mend the number$"),
        ({"0": "F"}, r"^schedule.ranks\[0\]: tasks=\[F0\] of language must hold each of the 2 mi"),
    ],
)
def test_order_that_does_not_fit_is_explained(changes, message):
    plan = shared(num_microbatches=2)
    order = {**dict(write_order(plan, build_schedule(plan))), **changes}
    stored = with_order(plan, {ranks: text for ranks, text in order.items() if text is not None})

    with pytest.raises(PlanError, match=message):
        verify(stored, build_schedule(stored))


def test_verify_marks_the_fault_in_its_table():
    plan = shared(num_microbatches=2)
    stored = with_order(
        plan, {"0": "(vision:F F)*2 (vision:B B)*2", "1": "vision:F*2 (F B)*2 vision:B*2"}
    )

    with pytest.raises(
        ScheduleError, match=r"task=B0 vision.0 must come after B0 language"
    ) as caught:
        verify(stored, build_schedule(stored))
    assert caught.value.table == (
        "2 microbatches; v = vision\nrank 0  vision.0 language.0  vF0 F0 vF1 F1 [vB0] B0 vB1 B1"
    )


def test_bubble_fill_shortens_the_warm_up_where_few_groups_may_be_live():
    # Language in four stages on two ranks, two microbatches in a group of vision.
    plan = plan_of(
        "bubble_fill",
        place("vision", 0, 1, dp=2),
        place("language", 0, 1, pp=2, vpp=2),
        num_microbatches=6,
        group=2,
        max_live=2,
    )
    schedule, timeline = filled(plan)

    language = [task for task in schedule.tasks[0] if task.module == "language"]
    # Megatron's warm-up of four tasks would run F4.0, of the third group, before B1.0.
    assert " ".join(f"{t.kind}{t.microbatches[0]}.{t.stage}" for t in language[:17]) == (
        "F0.0 F1.0 F0.2 F1.2 B0.2 F2.0 B1.2 F3.0 B0.0 F2.2 B1.0 F3.2 B2.2 F4.0 B3.2 F5.0 B2.0"
    )
    assert least_live(plan) == 2
    assert timeline.program.peak_live(Stage("vision", 0)) == 2


CIRCLES = {
    "bubble_fill": (
        place("audio", 0, 2, tp=2, trainable=()),
        place("vision", 0, 1, 2, dp=3, vpp=2),
        place("language", 2, 1, cp=2, vpp=2),
    ),
    "concurrent": (
        place("audio", 1, vpp=2, trainable=()),
        place("vision", 0, 1, dp=2),
        place("language", 1, 0, cp=2),
    ),
}


@pytest.mark.parametrize("kind", ["bubble_fill", "concurrent"])
def test_ranks_that_receive_together_do_not_wait_for_each_other_in_a_circle(kind):
    # Rank 0 once came to its second vision task before a task that it runs together with others,
    # one of those after it; a transfer from audio reaches none of them before all have posted it.
    plan = plan_of(
        kind,
        *CIRCLES[kind],
        num_microbatches=2,
        edges=(("audio", "vision"), ("vision", "language")),
        ahead=True,
    )

    verify(plan, build_schedule(plan))
