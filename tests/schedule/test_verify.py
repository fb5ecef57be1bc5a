from dataclasses import replace

import pytest

from megatron_mosaic.errors import PlanError
from megatron_mosaic.schedule.build import build_schedule
from megatron_mosaic.schedule.task import Task
from megatron_mosaic.schedule.verify import ScheduleError, verify
from tests.schedule.plans import place, plan_of


def tasks(text, *, language=0):
    """Reads cells such as ``vF0-1 F0 B0``; ``language`` is the language stage."""
    found = []
    for cell in text.split():
        module, stage = ("vision", 0) if cell[0] == "v" else ("language", language)
        kind, span = cell.removeprefix("v")[0], cell.removeprefix("v")[1:]
        first, last = map(int, (span.split("-") * 2)[:2])
        found.append(Task(kind, module, stage, tuple(range(first, last + 1))))
    return tuple(found)


def with_rank(schedule, rank, changed):
    rows = list(schedule.tasks)
    rows[rank] = changed
    return replace(schedule, tasks=tuple(rows))


def pipelined():
    plan = plan_of("1f1b", place("vision", 0, 1, dp=2), place("language", 2), num_microbatches=3)
    return plan, build_schedule(plan)


def shared():
    plan = plan_of(
        "colocated",
        place("vision", 0, 1, dp=2),
        place("language", 0, 1, pp=2),
        num_microbatches=2,
        group=1,
    )
    return plan, build_schedule(plan)


def test_verify_rejects_a_missing_task():
    plan, schedule = pipelined()
    changed = with_rank(schedule, 1, tasks("vF0 vF1 vB0 vF2 vB1"))

    message = r"^schedule.ranks\[1\]: task=B2 vision.0 must run once, not 0 times; add it$"
    with pytest.raises(ScheduleError, match=message):
        verify(plan, changed)


def test_verify_rejects_a_missing_microbatch():
    plan, schedule = pipelined()
    changed = with_rank(schedule, 0, tasks("vF0 vF1 vB0 vB1"))

    message = r"^schedule.ranks\[0\]: tasks=\[F0 F1\] of vision must hold each of the 3 microb"
    with pytest.raises(ScheduleError, match=message):
        verify(plan, changed)


def test_verify_rejects_a_task_that_runs_twice():
    plan, schedule = pipelined()
    changed = with_rank(schedule, 1, tasks("vF0 vF1 vB0 vB0 vF2 vB1 vB2"))

    message = r"task=B0 vision.0 must run once, not 2 times; remove the others"
    with pytest.raises(ScheduleError, match=message):
        verify(plan, changed)


def test_verify_rejects_a_task_on_a_rank_that_does_not_host_it():
    plan, schedule = pipelined()
    changed = with_rank(schedule, 2, (*schedule.tasks[2], Task("F", "vision", 0, (0,))))

    message = r"task=F0 vision.0 must be a task that the plan needs of language.0; remove it"
    with pytest.raises(ScheduleError, match=message):
        verify(plan, changed)


def test_verify_rejects_other_groups_on_a_replica():
    plan = plan_of(
        "colocated", place("vision", 0, 1, dp=2), place("language", 0), num_microbatches=2
    )
    changed = with_rank(build_schedule(plan), 1, tasks("vF0 vF1 vB0 vB1"))

    with pytest.raises(ScheduleError, match=r"ranks\[1\]: task=F0 vision.0 must be a task that"):
        verify(plan, changed)


def test_verify_rejects_backward_of_a_frozen_encoder():
    plan = plan_of(
        "no_pipelining", place("vision", 0, trainable=()), place("language", 0), num_microbatches=1
    )
    changed = with_rank(build_schedule(plan), 0, tasks("vF0 F0 B0 vB0"))

    with pytest.raises(ScheduleError, match=r"task=B0 vision.0 must be a task that the plan needs"):
        verify(plan, changed)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("vF0 B0 F0 vB0", r"task=B0 language.0 must come after F0 language.0; move it behind"),
        ("F0 vF0 B0 vB0", r"task=F0 language.0 must come after F0 vision.0; move it behind"),
        ("vF0 F0 vB0 B0", r"task=B0 vision.0 must come after B0 language.0; move it behind"),
    ],
)
def test_verify_rejects_a_task_before_what_it_needs(row, message):
    plan = plan_of("no_pipelining", place("vision", 0), place("language", 0), num_microbatches=1)
    changed = with_rank(build_schedule(plan), 0, tasks(row))

    with pytest.raises(ScheduleError, match=message):
        verify(plan, changed)


def test_verify_rejects_transfers_in_another_order_on_one_rank():
    plan, schedule = pipelined()
    changed = with_rank(schedule, 1, tasks("vF1 vF0 vB0 vF2 vB1 vB2"))

    message = (
        r"^schedule.ranks\[1\]: microbatch=1 of activation vision.0 -> language.0 must come after "
        r"0, as on rank 0; run the tasks of both ranks in the same order$"
    )
    with pytest.raises(ScheduleError, match=message):
        verify(plan, changed)


def test_verify_rejects_encoder_tasks_next_to_each_stages_own_language_tasks():
    plan, schedule = shared()
    changed = with_rank(schedule, 0, tasks("vF0 F0 vF1 F1 B0 vB0 B1 vB1"))
    changed = with_rank(changed, 1, tasks("vF0 F0 B0 vB0 vF1 F1 B1 vB1", language=1))

    # B0 on rank 0 comes after F1, which needs vF1 from rank 1 too.
    message = (
        r"^schedule.ranks\[0\]: task=F1 language.0 must not wait in a circle: for rank 1 at "
        r"B0 vision.0, which waits for rank 0; give these ranks' tasks one common order$"
    )
    with pytest.raises(ScheduleError, match=message):
        verify(plan, changed)


@pytest.mark.parametrize(
    ("split", "message"),
    [
        # Rank 0 is at vB0, rank 1 at vF1: the collectives inside never meet.
        (
            {"tp": 2},
            r"\[0\]: task=B0 vision.0 must not wait in a circle: for rank 1 at F1 vision.0",
        ),
        (
            {"cp": 2},
            r"\[0\]: task=B0 vision.0 must not wait in a circle: for rank 1 at F1 vision.0",
        ),
        # Replicas need not meet, but rank 1 holds a group too many.
        ({"dp": 2}, r"\[1\]: live=2 tasks of vision must be <= 1"),
    ],
)
def test_verify_lets_replicas_differ_but_not_ranks_of_one_collective(split, message):
    plan = plan_of(
        "colocated",
        place("vision", 0, 1, **split),
        place("language", 0),
        num_microbatches=2,
        group=1,
    )
    changed = with_rank(build_schedule(plan), 1, tasks("vF0 vF1 vB0 vB1"))

    with pytest.raises(ScheduleError, match=message):
        verify(plan, changed)


def test_verify_rejects_more_live_groups_than_the_kind_promises():
    plan = plan_of(
        "colocated", place("vision", 0), place("language", 0), num_microbatches=2, group=1
    )
    changed = with_rank(build_schedule(plan), 0, tasks("vF0 vF1 F0 B0 F1 B1 vB0 vB1"))

    message = r"live=2 tasks of vision must be <= 1, the bound of kind=colocated; run backward"
    with pytest.raises(ScheduleError, match=message):
        verify(plan, changed)


def test_verify_error_is_a_plan_error_of_one_line_with_the_rows_beside():
    plan, schedule = pipelined()
    changed = with_rank(schedule, 1, tasks("vF0 vF1 vB0 vF2 vB1"))

    with pytest.raises(PlanError, match=r"^[^\n]*$") as caught:
        verify(plan, changed)
    assert isinstance(caught.value, ScheduleError)
    assert caught.value.table == (
        "3 microbatches; v = vision\nrank 1  vision.0  vF0 vF1 vB0 vF2 vB1"
    )


def test_verify_accepts_evaluation_with_another_number_of_microbatches():
    plan, _ = shared()

    verify(plan, build_schedule(plan, num_microbatches=7, forward_only=True))
