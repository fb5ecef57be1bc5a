"""Who is named when a run stands still: decided from reports alone."""

from functools import partial
from pathlib import Path

import pytest

from megatron_mosaic.engine.lost import Limits, Report, describe, find_lost
from megatron_mosaic.engine.progress import UNKNOWN_S, Phase, Place, Progress
from megatron_mosaic.layout.plan import Plan
from megatron_mosaic.schedule.ahead import Part, steps_of_part
from megatron_mosaic.schedule.build import build_schedule
from megatron_mosaic.schedule.steps import Compute, Wait, steps_of

# Vision has TP 2 on ranks 0 and 2, language has PP 2 on ranks 1 and 2.
PLAN = Plan.load(Path(__file__).parent.parent / "plans" / "partial_interleaved.yaml")
LIMITS = Limits(task_s=None, default_task_s=45.0, heartbeat_s=30.0, start_s=600.0, interval_s=1.0)


def _steps(num_microbatches=8, forward_only=False):
    schedule = build_schedule(PLAN, num_microbatches=num_microbatches, forward_only=forward_only)
    return [steps_of(PLAN, schedule, rank) for rank in range(3)]


def _at(rank, kind, task, *, age_s, longest_s=1.0, **report):
    """A rank at the first step of a kind, Compute or Wait, that comes with a task."""
    steps = _steps()[rank]
    compute = next(i for i, s in enumerate(steps) if isinstance(s, Compute) and str(s.task) == task)
    position = compute if kind is Compute else compute - 1
    assert isinstance(steps[position], kind)
    place = Place(Phase.WALKING, 3, 3, 0, 8, position, 0.0, longest_s)
    return Report(place=place, age_s=age_s, **({"silent_s": 0.5, "state": "on"} | report))


def _closing(*, age_s, **report):
    place = Place(Phase.CLOSING, 3, 3, 0, 8, 0, 0.0, 1.0)
    return Report(place=place, age_s=age_s, **({"silent_s": 0.5, "state": "on"} | report))


find = partial(find_lost, limits=LIMITS, plan=PLAN, steps_of=lambda n, f, part: _steps(n, bool(f)))


def test_hung_rank_is_named_and_not_those_that_wait_for_it():
    reports = {
        0: _at(0, Compute, "F0-1 vision.0", age_s=60.0, communicates=True),
        1: _at(1, Wait, "F0 language.0", age_s=70.0, communicates=True),
        2: _at(2, Compute, "F0-1 vision.0", age_s=50.0),
    }

    lost = find(reports)

    assert lost is not None
    assert lost.line(PLAN) == (
        "run: rank=2 must leave F0-1 vision.0 of step 3 within 46 s; look at its output and its "
        "machine, or raise --mosaic-task-timeout-s if it was at work"
    )


def test_no_rank_is_named_while_the_one_they_wait_for_has_time():
    reports = {
        0: _at(0, Compute, "F0-1 vision.0", age_s=60.0, communicates=True),
        1: _at(1, Wait, "F0 language.0", age_s=70.0, communicates=True),
        2: _at(2, Compute, "F0-1 vision.0", age_s=45.0),
    }

    assert find(reports) is None


def test_host_that_ran_ahead_of_its_device_is_not_named():
    # Rank 0 has launched its part, and waits for its device outside any communication call.
    reports = {
        0: _at(0, Compute, "F2-3 vision.0", age_s=60.0),
        1: _at(1, Compute, "F0 language.0", age_s=70.0),
        2: _at(2, Compute, "F0-1 vision.0", age_s=50.0),
    }

    assert find(reports).rank == 2


def test_task_of_the_first_step_may_be_compiled_for_minutes():
    reports = {
        rank: _at(rank, Compute, task, age_s=500.0, longest_s=UNKNOWN_S)
        for rank, task in enumerate(("F0-1 vision.0", "F0 language.0", "F0-1 vision.0"))
    }

    assert find(reports) is None


def test_tasks_that_take_long_in_every_step_are_no_hang():
    report = _at(2, Compute, "F0-1 vision.0", age_s=100.0, longest_s=60.0)

    assert find({0: _closing(age_s=1.0), 1: _closing(age_s=1.0), 2: report}) is None


def test_rank_that_hangs_after_its_tasks_is_named():
    reports = {
        0: _closing(age_s=60.0, communicates=True),
        1: _closing(age_s=50.0),
        2: _closing(age_s=60.0, communicates=True),
    }

    assert find(reports).rank == 1


def test_work_between_steps_has_no_limit():
    place = Place(Phase.BETWEEN, 3, 3, 0, 8, 0, 0.0, UNKNOWN_S)
    report = Report(place=place, age_s=5000.0, silent_s=0.5, state="on")

    assert find(dict.fromkeys(range(3), report)) is None


def test_silent_rank_is_named_before_those_that_its_loss_cuts_off():
    reports = {
        0: _at(0, Compute, "F0-1 vision.0", age_s=6.0, state="cut_off", state_s=6.0, order=1),
        1: _at(1, Wait, "F0 language.0", age_s=6.0),
        2: _at(2, Compute, "F0-1 vision.0", age_s=6.0, silent_s=6.0),
    }

    # A communication has failed: 5 intervals are patience enough.
    assert find(reports).line(PLAN) == (
        "run: rank=2 must answer within 5 s, it was last in F0-1 vision.0 of step 3; look at its "
        "output and its machine"
    )
    reports[2] = _at(2, Compute, "F0-1 vision.0", age_s=6.0, silent_s=4.0)
    assert find(reports) is None


def test_silence_without_a_failed_communication_is_borne_for_longer():
    reports = {0: _closing(age_s=6.0), 1: _closing(age_s=6.0, silent_s=29.0)}
    assert find(reports) is None

    reports[1] = _closing(age_s=6.0, silent_s=31.0)
    assert find(reports).rank == 1


def test_first_error_is_named():
    reports = {
        0: _closing(age_s=6.0, state="raised", order=2, message="RuntimeError: x"),
        1: _closing(age_s=6.0, state="raised", order=1, message="KeyError: 'token'"),
    }

    assert find(reports).line(PLAN) == (
        "run: rank=1 must end the losses and gradients of step 3 without an error, it had "
        "KeyError: 'token'; look at its output and its machine"
    )


@pytest.mark.parametrize("state", ["ended", "terminated"])
def test_rank_that_ended_is_not_missed(state):
    reports = {0: _closing(age_s=6.0), 1: _closing(age_s=6.0, silent_s=100.0, state=state)}

    assert find(reports) is None


def test_rank_that_left_alone_is_named():
    left = _closing(age_s=6.0, silent_s=31.0, state="left", message="SystemExit: 3")

    assert find({0: _closing(age_s=6.0), 1: left}).message == "SystemExit: 3"


def test_transfer_is_described_with_its_task():
    report = _at(1, Wait, "F0 language.0", age_s=6.0)

    assert describe(report.place, 1, PLAN) == (
        "activation 0 of vision.0 -> language.0, at F0 language.0 of step 3"
    )


def test_progress_remembers_the_longest_task_of_the_step_before():
    progress = Progress()
    (step,) = [s for s in _steps()[0] if isinstance(s, Compute)][:1]
    for _ in range(2):
        progress.begin_step(1, num_microbatches=8, forward_only=False)
        assert (progress.place.longest_s == UNKNOWN_S) == (progress.place.count == 1)
        progress.begin(0, step)
        progress.end(step)
        progress.close_step(1)
        progress.end_step()

    assert progress.place.longest_s == UNKNOWN_S  # no limit between steps
    assert progress.place.phase == Phase.BETWEEN


# Vision is frozen, with PP 2 on ranks 0 and 1; language has PP 2 on ranks 1 and 2.
AHEAD = Plan.load(Path(__file__).parent.parent / "plans" / "ahead_vision_stages.yaml")


def _steps_ahead(num_microbatches, forward_only, part):
    schedule = build_schedule(AHEAD, num_microbatches=num_microbatches, forward_only=forward_only)
    return [
        steps_of_part(steps_of(AHEAD, schedule, rank), schedule, Part(part)) for rank in range(3)
    ]


def _at_task(rank, task, *, part, nth=0, age_s=60.0, **report):
    steps = _steps_ahead(8, False, part)[rank]
    tasks = [i for i, s in enumerate(steps) if isinstance(s, Compute) and str(s.task) == task]
    place = Place(Phase.WALKING, 3, 3, 0, 8, tasks[nth], 0.0, 1.0, part)
    return Report(place=place, age_s=age_s, **({"silent_s": 0.5, "state": "on"} | report))


def test_task_that_runs_ahead_is_named_as_of_the_next_step():
    report = _at_task(0, "F1 vision.0", part=Part(0))

    assert describe(report.place, 0, AHEAD) == "F1 vision.0 of step 4, ahead in step 3"


def test_task_that_nothing_ran_ahead_for_is_named_as_of_its_step():
    first, second = (_at_task(0, "F1 vision.0", part=Part.BEGINS, nth=n) for n in (0, 1))

    assert describe(first.place, 0, AHEAD) == "F1 vision.0 of step 3"
    assert describe(second.place, 0, AHEAD) == "F1 vision.0 of step 4, ahead in step 3"


def test_rank_that_hangs_before_its_first_step_is_named():
    # Rank 0 has sent what rank 1 is at. That it will send the like for the next step is no matter.
    reports = {
        0: _at_task(0, "F0 vision.0", part=Part.BEGINS, nth=1, age_s=1.0),
        1: _at_task(1, "F0 vision.1", part=Part.BEGINS),
        2: _at_task(2, "F0 language.1", part=Part.BEGINS, age_s=1.0, communicates=True),
    }

    lost = find_lost(reports, LIMITS, plan=AHEAD, steps_of=_steps_ahead)

    assert lost is not None
    assert lost.line(AHEAD).startswith("run: rank=1 must leave F0 vision.1 of step 3 within 46 s")
