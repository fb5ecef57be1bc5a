"""Lanes that slow each other down: literal times, and what holds for every program."""

import random
from itertools import pairwise

import pytest
from hypothesis import given, settings

from megatron_mosaic.schedule.build import build_schedule
from megatron_mosaic.schedule.fill import fill
from megatron_mosaic.schedule.graph import Stage, stage_order
from megatron_mosaic.schedule.lane_notes import lane_notes, noted_lanes
from megatron_mosaic.schedule.plan_program import program_of_plan
from megatron_mosaic.schedule.program import program_of
from megatron_mosaic.schedule.simulate import LaneTimes, Pass, PassTimes, simulate
from megatron_mosaic.schedule.steps import edges_of
from tests.schedule.plans import place, plan_of, table
from tests.schedule.test_random_schedules import SEEDS, some_plan

VISION, LANGUAGE = Stage("vision", 0), Stage("language", 0)


def all_by(factor):
    """Every pass takes so many times as long as soon as another is at work."""
    return lambda passes: (factor,) * len(passes)


def one_rank(num_microbatches=2, **choice):
    return plan_of(
        "concurrent",
        place("vision", 0, trainable=()),
        place("language", 0),
        num_microbatches=num_microbatches,
        **choice,
    )


def spans(timeline):
    return [
        (f"{s.task.module[0]}{s.task.kind}{s.task.microbatches[0]}", s.start_s, s.end_s)
        for s in timeline.spans(timeline.program.kinds[0])
    ]


def test_tasks_beside_each_other_go_at_their_slowdown_until_one_ends():
    times = {VISION: PassTimes(2.0, 0.0), LANGUAGE: PassTimes(4.0, 2.0)}

    timeline = simulate(
        program_of_plan(one_rank()), tasks_s=times, lanes=LaneTimes(times, all_by(1.5))
    )

    # Alone until F0 can start. Beside it vF1 takes 2 * 1.5 = 3 s; F0 has done 3 / 1.5 = 2 s of its
    # 4 by then, and does the other 2 at full speed.
    assert spans(timeline) == [
        ("vF0", 0.0, 2.0),
        ("vF1", 2.0, 5.0),
        ("lF0", 2.0, 7.0),
        ("lB0", 7.0, 9.0),
        ("lF1", 9.0, 13.0),
        ("lB1", 13.0, 15.0),
    ]
    assert timeline.busy_s(timeline.program.kinds[0]) == 15.0
    assert timeline.bubble_s(timeline.program.kinds[0]) == 0.0


def test_task_that_is_alone_takes_its_time_on_the_whole_gpu():
    whole = {VISION: PassTimes(2.0, 0.0), LANGUAGE: PassTimes(4.0, 2.0)}
    shared = {VISION: PassTimes(6.0, 0.0), LANGUAGE: PassTimes(5.0, 3.0)}

    timeline = simulate(
        program_of_plan(one_rank()), tasks_s=whole, lanes=LaneTimes(shared, all_by(1.0))
    )

    # Only vF0 is alone for sure, before F0; F1 and B1 come after vF1 as well.
    assert spans(timeline) == [
        ("vF0", 0.0, 2.0),
        ("vF1", 2.0, 8.0),
        ("lF0", 2.0, 7.0),
        ("lB0", 7.0, 10.0),
        ("lF1", 10.0, 14.0),
        ("lB1", 14.0, 16.0),
    ]


def test_task_of_several_ranks_goes_at_the_speed_of_the_slowest():
    # Language has two tensor-parallel ranks, vision runs on one of them.
    plan = plan_of(
        "concurrent",
        place("vision", 0, trainable=()),
        place("language", 0, 1, tp=2),
        num_microbatches=2,
    )
    times = {VISION: PassTimes(2.0, 0.0), LANGUAGE: PassTimes(4.0, 2.0)}

    timeline = simulate(program_of_plan(plan), tasks_s=times, lanes=LaneTimes(times, all_by(1.5)))

    for kind in timeline.program.kinds:
        assert [s.end_s for s in timeline.spans(kind) if s.task.module == "language"] == [
            7.0,
            9.0,
            13.0,
            15.0,
        ]


def test_slowdown_is_asked_with_the_passes_at_work():
    plan = plan_of(
        "concurrent",
        place("audio", 0, trainable=()),
        place("vision", 0, trainable=()),
        place("language", 0),
        num_microbatches=2,
    )
    asked = []

    def slowdown(passes):
        asked.append(passes)
        return (1.0,) * len(passes)

    times = {stage: PassTimes(1.0, 1.0) for stage in stage_order(plan)}
    simulate(program_of_plan(plan), tasks_s=times, lanes=LaneTimes(times, slowdown))

    audio, vision, language = (Pass(stage, False) for stage in stage_order(plan))
    # First both encoders, then language beside them; each combination once.
    assert asked == [(audio, vision), (audio, vision, language)]


def test_tasks_that_end_at_the_same_moment_do_not_slow_what_starts_then():
    times = {VISION: PassTimes(3.0, 0.0), LANGUAGE: PassTimes(1.0, 2.0)}
    lanes = LaneTimes(times, all_by(2.0))

    timeline = simulate(program_of_plan(one_rank(3)), tasks_s=times, lanes=lanes)

    # vF1 and F0 start at 3 s at half speed: F0 ends at 5, B0 at 9; so does vF1, 3 * 2 s long.
    assert spans(timeline)[:5] == [
        ("vF0", 0.0, 3.0),
        ("vF1", 3.0, 9.0),
        ("lF0", 3.0, 5.0),
        ("vF2", 9.0, 15.0),
        ("lB0", 5.0, 9.0),
    ]


def test_overlapping_tasks_count_once_as_busy():
    times = {VISION: PassTimes(2.0, 0.0), LANGUAGE: PassTimes(1.0, 1.0)}
    program = program_of_plan(one_rank())

    timeline = simulate(program, tasks_s=times, lanes=LaneTimes(times, all_by(1.0)))

    # vF0 0-2, vF1 and then F0, B0 2-4, F1 and B1 4-6.
    assert timeline.makespan_s == 6.0
    assert timeline.busy_s(program.kinds[0]) == 6.0


def test_fill_gives_a_quota_its_time_where_ranks_are_shared():
    # Rank 0 hosts both, rank 1 vision alone: there it has the whole GPU.
    plan = plan_of(
        "concurrent",
        place("vision", 0, 1, dp=2, trainable=()),
        place("language", 0),
        num_microbatches=3,
    )
    fast = {VISION: PassTimes(1.0, 0.0), LANGUAGE: PassTimes(1.0, 1.0)}
    slow = {VISION: PassTimes(2.0, 0.0), LANGUAGE: PassTimes(1.0, 1.0)}

    # Launched in the order in which tasks start: vF2 after one pass of language, or after two.
    assert table(fill(plan, tasks_s=fast))[0] == "vF0 vF1 F0 vF2 B0 F1 B1 F2 B2"
    with_quota = fill(plan, tasks_s=fast, lanes=LaneTimes(slow, all_by(1.0)))
    assert table(with_quota)[0] == "vF0 vF1 F0 B0 vF2 F1 B1 F2 B2"


def some_times(rng, plan):
    """Durations in quarters of a second, whose sums have no rounding."""
    stages = stage_order(plan)
    tasks_s = {s: PassTimes(rng.randint(0, 20) / 4, rng.randint(0, 20) / 4) for s in stages}
    transfers_s = {edge: rng.randint(0, 4) / 4 for edge in edges_of(plan)}
    return {"tasks_s": tasks_s, "transfers_s": transfers_s}


def some_slowdown(rng):
    factors = {}

    def slowdown(passes):
        return factors.setdefault(passes, tuple(1 + rng.random() for _ in passes))

    return slowdown


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(SEEDS)
def test_without_slowdown_lanes_run_as_if_they_were_apart(seed):
    rng = random.Random(seed)
    plan = some_plan(rng, ("concurrent",))
    program, times = program_of(plan, build_schedule(plan)), some_times(rng, plan)

    plain = simulate(program, **times)
    beside = simulate(program, **times, lanes=LaneTimes(times["tasks_s"], all_by(1.0)))

    assert beside.end_s.tolist() == plain.end_s.tolist()
    assert beside.start_s.tolist() == plain.start_s.tolist()


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(SEEDS)
def test_slowdown_makes_no_task_end_sooner(seed):
    rng = random.Random(seed)
    plan = some_plan(rng, ("concurrent",))
    program, times = program_of(plan, build_schedule(plan)), some_times(rng, plan)

    plain = simulate(program, **times)
    slowed = simulate(program, **times, lanes=LaneTimes(times["tasks_s"], some_slowdown(rng)))

    assert (slowed.end_s >= plain.end_s - 1e-9).all()
    for kind in program.kinds:
        assert slowed.busy_s(kind) <= slowed.makespan_s + 1e-9


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(SEEDS)
def test_every_task_does_its_work_at_the_speed_of_what_is_beside_it(seed):
    rng = random.Random(seed)
    plan = some_plan(rng, ("concurrent",))
    program, times = program_of(plan, build_schedule(plan)), some_times(rng, plan)
    slowdown = some_slowdown(rng)
    lanes = LaneTimes(times["tasks_s"], slowdown)

    timeline = simulate(program, **times, lanes=lanes)

    moments = sorted({*timeline.start_s.tolist(), *timeline.end_s.tolist()})
    done_s = [0.0] * len(timeline.end_s)
    for start_s, end_s in pairwise(moments):
        for task, speed in speeds(timeline, (start_s + end_s) / 2, slowdown).items():
            done_s[task] += (end_s - start_s) * speed
    plain = simulate(program, **times)
    assert done_s == pytest.approx((plain.end_s - plain.start_s).tolist(), abs=1e-6)


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(SEEDS)
def test_notes_of_lanes_lead_to_the_same_step(seed):
    rng = random.Random(seed)
    plan = some_plan(rng, ("concurrent",))
    program, times = program_of(plan, build_schedule(plan)), some_times(rng, plan)
    factors = {}

    def slowdown(passes):  # in eighths, so that no digit is lost
        return factors.setdefault(passes, tuple(1 + rng.randint(0, 8) / 8 for _ in passes))

    lanes = LaneTimes(times["tasks_s"], slowdown)
    notes = lane_notes(program, **times, lanes=lanes)
    noted = noted_lanes(
        {
            stage: PassTimes(*notes["tasks_s"][".".join(map(str, stage))])
            for stage in times["tasks_s"]
        },
        {names: tuple(own) for names, own in notes["slowdown"].items()},
    )

    again = simulate(program, **times, lanes=noted)
    assert again.end_s.tolist() == simulate(program, **times, lanes=lanes).end_s.tolist()


def test_passes_that_notes_do_not_hold_are_slowed_as_the_worst_that_they_met():
    audio, vision, language = (
        Pass(Stage(name, 0), False) for name in ("audio", "vision", "language")
    )
    noted = noted_lanes(
        {},
        {"F audio.0 + F language.0": (1.2, 1.1), "F vision.0 + F language.0": (1.3, 1.4)},
    )

    assert noted.slowdown((audio, language)) == (1.2, 1.1)
    assert noted.slowdown((audio, vision, language)) == (1.2, 1.3, 1.4)


def speeds(timeline, now_s, slowdown):
    """Speed of each task at work: that of the slowest rank that runs it."""
    program, found = timeline.program, {}
    at_work = (timeline.start_s < now_s) & (now_s < timeline.end_s)
    for kind in program.kinds:
        own = [int(n) for n in program.tasks_of(kind) if at_work[n]]
        own.sort(key=lambda n: (program.tasks.stage[n], program.tasks.backward[n]))
        passes = tuple(
            Pass(program.parts[program.tasks.stage[n]].stage, bool(program.tasks.backward[n]))
            for n in own
        )
        factors = slowdown(passes) if len(passes) > 1 else (1.0,)
        for task, factor in zip(own, factors, strict=bool(own)):
            found[task] = min(found.get(task, 1.0), 1 / factor)
    return found
