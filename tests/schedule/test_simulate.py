"""The simulator against drawn tables, limits, and an event loop that knows no arrays."""

from collections import defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mosaic.schedule.build import build_schedule
from megatron_mosaic.schedule.graph import (
    RankKind,
    Stage,
    hosted_stages,
    needs_backward,
    rank_kinds,
    stage_order,
)
from megatron_mosaic.schedule.plan_program import program_of_plan
from megatron_mosaic.schedule.program import program_of
from megatron_mosaic.schedule.schedule import peak_live
from megatron_mosaic.schedule.simulate import PassTimes, simulate
from megatron_mosaic.schedule.steps import Edge, edges_of
from tests.schedule.plans import place, plan_of
from tests.schedule.test_properties import plans

TIMES = st.integers(0, 9).map(float)


def drawn(timeline):
    """One row for every kind of rank, a cell for every second; a point is waiting."""
    rows = []
    for kind in timeline.program.kinds:
        cells = ["."] * round(timeline.makespan_s)
        for task, start_s, end_s in timeline.spans(kind):
            name = f"{'' if task.module == 'language' else task.module[0]}{str(task).split()[0]}"
            cells[round(start_s) : round(end_s)] = [name] * (round(end_s) - round(start_s))
        rows.append(" ".join(cells))
    return rows


@st.composite
def timed_plans(draw):
    plan = draw(plans())
    tasks_s = {stage: PassTimes(draw(TIMES), draw(TIMES)) for stage in stage_order(plan)}
    transfers_s = {edge: draw(TIMES) for edge in edges_of(plan)}
    num_microbatches = draw(st.none() | st.integers(1, 12))
    options = {"num_microbatches": num_microbatches, "forward_only": draw(st.booleans())}
    return plan, tasks_s, transfers_s, options


class EventLoop:
    """Starts whatever can start, task by task and rank by rank."""

    def __init__(self, plan, schedule, tasks_s, transfers_s):
        self.plan, self.schedule = plan, schedule
        self.tasks_s, self.transfers_s = tasks_s, transfers_s
        self.hosts, self.longest = defaultdict(list), defaultdict(int)
        for rank, tasks in enumerate(schedule.tasks):
            for stage in hosted_stages(plan, rank):
                self.hosts[stage].append(rank)
            for task in tasks:
                self.longest[task[1:3]] = max(self.longest[task[1:3]], len(task.microbatches))
        self.lists = [list(tasks) for tasks in schedule.tasks]
        self.free_s = [0.0] * plan.world_size
        self.arrived_s, self.ends = {}, {}

    def run(self):
        while heads := {tasks[0] for tasks in self.lists if tasks}:
            runnable = [task for task in heads if self.can_start(task)]
            assert runnable
            for task in runnable:
                self.run_task(task)
        return self.ends

    def can_start(self, task):
        members = self.hosts[task[1:3]]
        here = all(self.lists[rank][:1] == [task] for rank in members)
        return here and all(key in self.arrived_s for key in self.inputs(task))

    def inputs(self, task):
        for edge in edges_of(self.plan):
            if (edge[2:] if task.kind == "F" else edge[:2]) == task[1:3]:
                yield from ((task.kind, edge, m) for m in task.microbatches)

    def run_task(self, task):
        members = self.hosts[task[1:3]]
        arrivals_s = [self.arrived_s[key] for key in self.inputs(task)]
        start_s = max([self.free_s[rank] for rank in members] + arrivals_s)
        share = len(task.microbatches) / self.longest[task[1:3]]
        end_s = start_s + share * self.tasks_s[task[1:3]]["FB".index(task.kind)]
        self.ends[task] = end_s
        for rank in members:
            self.lists[rank].pop(0)
            self.free_s[rank] = end_s
        for edge in edges_of(self.plan):
            if (edge[:2] if task.kind == "F" else edge[2:]) == task[1:3]:
                for n, m in enumerate(task.microbatches, start=1):
                    self.arrived_s[task.kind, edge, m] = end_s + n * self.transfers_s[edge]


def longest_chain_s(plan, tasks_s, transfers_s, *, forward_only):
    """Time that the first microbatch takes if nothing else needs a rank."""
    into, out_of = defaultdict(list), defaultdict(list)
    for edge in edges_of(plan):
        into[edge[2:]].append((edge[:2], transfers_s[edge]))
        out_of[edge[:2]].append((edge[2:], transfers_s[edge]))
    forward_s, backward_s = {}, {}
    for stage in stage_order(plan):
        arrival_s = max([0.0, *(forward_s[source] + lag_s for source, lag_s in into[stage])])
        forward_s[stage] = arrival_s + tasks_s[stage].forward_s
    for stage in reversed(stage_order(plan)):
        if needs_backward(plan, stage.module) and not forward_only:
            arrivals_s = [backward_s[after] + lag_s for after, lag_s in out_of[stage]]
            start_s = max([forward_s[stage], *arrivals_s])
            backward_s[stage] = start_s + tasks_s[stage].backward_s
    return max([*forward_s.values(), *backward_s.values()])


@settings(max_examples=300, deadline=None)
@given(timed_plans())
def test_simulation_equals_an_event_loop(timed):
    plan, tasks_s, transfers_s, options = timed
    schedule = build_schedule(plan, **options)

    timeline = simulate(program_of_plan(plan, **options), tasks_s=tasks_s, transfers_s=transfers_s)

    found = {s.task: s.end_s for kind in timeline.program.kinds for s in timeline.spans(kind)}
    assert found == pytest.approx(EventLoop(plan, schedule, tasks_s, transfers_s).run())


@settings(max_examples=200, deadline=None)
@given(timed_plans())
def test_program_of_a_plan_has_the_tasks_of_its_schedule(timed):
    plan, *_, options = timed
    schedule = build_schedule(plan, **options)
    program = program_of_plan(plan, **options)

    for kind in program.kinds:
        for rank in kind.ranks:
            assert tuple(program.task(i) for i in program.tasks_of(kind)) == schedule.tasks[rank]


@settings(max_examples=100, deadline=None)
@given(timed_plans())
def test_program_of_any_schedule_runs_as_that_of_its_plan(timed):
    plan, tasks_s, transfers_s, options = timed
    programs = program_of_plan(plan, **options), program_of(plan, build_schedule(plan, **options))

    one, other = (simulate(p, tasks_s=tasks_s, transfers_s=transfers_s) for p in programs)

    assert all(list(one.spans(kind)) == list(other.spans(kind)) for kind in one.program.kinds)


@settings(max_examples=200, deadline=None)
@given(timed_plans())
def test_step_takes_no_less_than_its_longest_chain_and_its_busiest_rank(timed):
    plan, tasks_s, transfers_s, options = timed
    timeline = simulate(program_of_plan(plan, **options), tasks_s=tasks_s, transfers_s=transfers_s)

    least_s = longest_chain_s(plan, tasks_s, transfers_s, forward_only=options["forward_only"])
    assert timeline.makespan_s >= least_s
    for kind in timeline.program.kinds:
        assert timeline.makespan_s >= timeline.busy_s(kind)


@settings(max_examples=100, deadline=None)
@given(timed_plans())
def test_peak_live_is_that_of_the_schedule(timed):
    plan, *_, options = timed
    schedule = build_schedule(plan, **options)
    program = program_of_plan(plan, **options)

    for kind in program.kinds:
        for stage in kind.stages:
            assert program.peak_live(stage) == peak_live(schedule, kind.ranks[0], stage.module)


def simulated(plan, *, transfers_s=None, **module_times):
    tasks_s = {stage: PassTimes(*module_times[stage.module]) for stage in stage_order(plan)}
    return simulate(program_of_plan(plan), tasks_s=tasks_s, transfers_s=transfers_s)


def test_one_f_one_b_waits_for_the_way_through_the_pipeline():
    plan = plan_of("1f1b", place("language", 0, 1, pp=2), num_microbatches=3)

    timeline = simulated(plan, language=(1, 2))

    # (3 + 2 - 1) * (1 + 2) seconds, of which each rank works 3 * (1 + 2).
    assert drawn(timeline) == [
        "F0 F1 . . B0 B0 F2 B1 B1 . B2 B2",
        ". F0 B0 B0 F1 B1 B1 F2 B2 B2 . .",
    ]
    assert [timeline.busy_s(kind) for kind in timeline.program.kinds] == [9, 9]
    assert [timeline.bubble_s(kind) for kind in timeline.program.kinds] == [3, 3]


def test_transfers_take_time_in_both_directions():
    plan = plan_of("1f1b", place("language", 0, 1, pp=2), num_microbatches=2)

    timeline = simulated(
        plan, language=(1, 2), transfers_s={Edge("language", 0, "language", 1): 1.0}
    )

    assert drawn(timeline) == [
        "F0 F1 . . . . B0 B0 . B1 B1",
        ". . F0 B0 B0 F1 B1 B1 . . .",
    ]


def test_encoders_beside_each_other_are_waited_for_together():
    plan = plan_of(
        "1f1b", place("vision", 0), place("audio", 1), place("language", 2), num_microbatches=3
    )

    timeline = simulated(plan, vision=(2, 1), audio=(1, 1), language=(1, 2))

    assert drawn(timeline) == [
        "vF0 vF0 vF1 vF1 . vB0 vF2 vF2 vB1 . . vB2",
        "aF0 aF1 . . . aB0 aF2 . aB1 . . aB2",
        ". . F0 B0 B0 F1 B1 B1 F2 B2 B2 .",
    ]


def test_group_on_shared_ranks_pauses_the_pipeline():
    plan = plan_of(
        "colocated",
        place("vision", 0, 1, dp=2),
        place("language", 0, 1, pp=2),
        num_microbatches=4,
        group=2,
    )

    timeline = simulated(plan, vision=(2, 2), language=(1, 1))

    assert drawn(timeline) == [
        "vF0-1 vF0-1 F0 F1 . B0 vF2-3 vF2-3 F2 B1 . vB0-1 vB0-1 F3 B2 . B3 vB2-3 vB2-3",
        "vF0-1 vF0-1 . F0 B0 F1 vF2-3 vF2-3 B1 F2 B2 vB0-1 vB0-1 . F3 B3 . vB2-3 vB2-3",
    ]


def test_ranks_of_an_encoder_that_share_some_of_the_pipeline_start_together():
    plan = plan_of(
        "colocated",
        place("vision", 1, 2, dp=2, trainable=()),
        place("language", 0, 1, pp=2),
        num_microbatches=4,
        group=2,
    )

    timeline = simulated(
        plan, vision=(2, 2), language=(1, 1), transfers_s={Edge("vision", 0, "language", 0): 1.0}
    )

    # Rank 2 is free, but works with rank 1. The second microbatch of a group arrives a second
    # after the first.
    assert drawn(timeline) == [
        ". . . F0 F1 . B0 . . . F2 B1 F3 B2 . B3",
        "vF0-1 vF0-1 . . F0 B0 F1 vF2-3 vF2-3 B1 . F2 B2 F3 B3 .",
        "vF0-1 vF0-1 . . . . . vF2-3 vF2-3 . . . . . . .",
    ]
    assert [kind.ranks for kind in timeline.program.kinds] == [(0,), (1,), (2,)]


def test_short_last_group_takes_its_share_of_a_groups_time():
    plan = plan_of(
        "colocated", place("vision", 0), place("language", 0), num_microbatches=4, group=4
    )
    program = program_of_plan(plan, num_microbatches=6, forward_only=True)
    tasks_s = {Stage("vision", 0): PassTimes(4.0, 0.0), Stage("language", 0): PassTimes(1.0, 0.0)}

    timeline = simulate(program, tasks_s=tasks_s)

    assert drawn(timeline) == ["vF0-3 vF0-3 vF0-3 vF0-3 F0 F1 F2 F3 vF4-5 vF4-5 F4 F5"]


@pytest.mark.parametrize("num_stages", [1, 2, 5, 16])
@pytest.mark.parametrize("num_microbatches", [1, 4, 16, 50])
def test_balanced_one_f_one_b_takes_the_textbooks_time(num_stages, num_microbatches):
    plan = plan_of(
        "1f1b",
        place("language", *range(num_stages), pp=num_stages),
        num_microbatches=num_microbatches,
    )

    timeline = simulated(plan, language=(3, 5))

    # Narayanan et al., 2021, arXiv:2104.04473, section 2.2.1: (m + p - 1) (t_f + t_b).
    assert timeline.makespan_s == (num_microbatches + num_stages - 1) * 8


def test_replicas_are_one_kind_of_rank():
    plan = plan_of("1f1b", place("language", *range(4096), dp=64, tp=16, pp=4), num_microbatches=8)

    kinds = rank_kinds(plan)

    assert [len(kind.ranks) for kind in kinds] == [1024] * 4
    assert kinds[1] == RankKind((Stage("language", 1),), tuple(range(1024, 2048)))


def test_idle_ranks_are_of_no_kind():
    plan = plan_of("1f1b", place("language", 1), num_microbatches=1, world_size=3)

    assert rank_kinds(plan) == (RankKind((Stage("language", 0),), (1,)),)
