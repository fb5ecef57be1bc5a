"""A schedule as arrays: what every task waits for, with equal ranks folded."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_mosaic.layout.plan import Plan
from megatron_mosaic.schedule.graph import RankKind, Stage, rank_kinds, stage_order
from megatron_mosaic.schedule.schedule import Schedule
from megatron_mosaic.schedule.steps import Edge, edges_of
from megatron_mosaic.schedule.task import Task

Integers = NDArray[np.int64]

START = -1
"""Stands for a task before, where there is none."""


class TaskArrays(NamedTuple):
    """Tasks of a step, once each, in an order that can run.

    Args:
        stage: Stage of every task, as a position in a list.
        backward: 1 for a backward pass, 0 for a forward pass.
        first: First microbatch of every task.
        count: Its microbatches.
    """

    stage: Integers
    backward: Integers
    first: Integers
    count: Integers


class Inputs(NamedTuple):
    """One thing that tasks wait for.

    Args:
        task: Tasks that wait.
        before: Task that each waits for, or ``START``.
        edge: Edge between the two; the number of edges if there is none.
        passed: Microbatches that cross the edge, one after the other, until the last one that
            is waited for is there.
    """

    task: Integers
    before: Integers
    edge: Integers
    passed: Integers


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Program:
    """What a simulation runs.

    Args:
        stages: Stages that ``tasks.stage`` counts.
        edges: Edges that ``Inputs.edge`` counts.
        kinds: Ranks that host the same stages, and so have the same tasks; none that are idle.
        tasks: All tasks.
        rank: For every task, the one before it on the first kind of ranks that runs it.
        data: For every task, where its first input comes from.
        others: What some tasks wait for besides: more kinds of ranks, more inputs.
    """

    stages: tuple[Stage, ...]
    edges: tuple[Edge, ...]
    kinds: tuple[RankKind, ...]
    tasks: TaskArrays
    rank: Inputs
    data: Inputs
    others: Inputs

    def task(self, index: int) -> Task:
        """One task."""
        stage, backward, first, count = (int(column[index]) for column in self.tasks)
        kind = "B" if backward else "F"
        return Task(kind, *self.stages[stage], tuple(range(first, first + count)))

    def tasks_of(self, kind: RankKind) -> Integers:
        """Positions of the tasks that ranks of a kind run, in their order."""
        hosted = [self.stages.index(stage) for stage in kind.stages]
        return np.flatnonzero(np.isin(self.tasks.stage, hosted))

    def peak_live(self, stage: Stage) -> int:
        """Most tasks of a stage whose activations a rank holds at the same time."""
        own = self.tasks.backward[self.tasks.stage == self.stages.index(stage)]
        if not own.any():
            return min(len(own), 1)
        return int(np.cumsum(1 - 2 * own).max())


def program_of(plan: Plan, schedule: Schedule) -> Program:
    """Makes the program of any schedule of a plan that ``verify`` accepts.

    Every stage must run its microbatches in ascending order, as all built schedules do.
    """
    stages = stage_order(plan)
    number = {stage: index for index, stage in enumerate(stages)}
    rows = [
        (number[Stage(*task[1:3])], task.kind == "B", task.microbatches[0], len(task.microbatches))
        for task in _common_order(plan, schedule)
    ]
    return wire(plan, TaskArrays(*np.array(rows, dtype=np.int64).reshape(-1, 4).T))


def wire(plan: Plan, tasks: TaskArrays) -> Program:
    """Finds out what every task of a plan waits for.

    Args:
        plan: The plan.
        tasks: Tasks; ``stage`` counts the plan's ``stage_order``.
    """
    stages, edges, kinds = stage_order(plan), edges_of(plan), rank_kinds(plan)
    rank, *more_ranks = _rank_inputs(tasks, stages, kinds, no_edge=len(edges))
    data, *more_data = _data_inputs(tasks, stages, edges)
    others = [np.concatenate(column) for column in zip(*more_ranks, *more_data, strict=True)]
    order = np.argsort(others[0], kind="stable") if others else np.array([], dtype=np.int64)
    return Program(
        stages=stages,
        edges=edges,
        kinds=kinds,
        tasks=tasks,
        rank=rank,
        data=data,
        others=Inputs(*(column[order] for column in others or [order] * 4)),
    )


def _rank_inputs(
    tasks: TaskArrays, stages: tuple[Stage, ...], kinds: tuple[RankKind, ...], *, no_edge: int
) -> Iterator[Inputs]:
    """Tasks before on the same ranks: all tasks' on their first kind, then those on others."""
    number = {stage: index for index, stage in enumerate(stages)}
    hosts: list[list[int]] = [[] for _ in stages]
    for k, hosting in enumerate(kinds):
        for stage in hosting.stages:
            hosts[number[stage]].append(k)
    # One row for every task and kind of ranks that runs it; `slot` counts those of one task.
    num_hosts = np.array([len(own) for own in hosts])[tasks.stage]
    task, slot = _spread(num_hosts)
    kind = _padded(hosts)[slot, tasks.stage[task]]
    by_kind = np.argsort(kind.astype(np.int16), kind="stable")
    same = kind[by_kind[1:]] == kind[by_kind[:-1]]
    before = np.full(len(task), START)
    before[by_kind[1:]] = np.where(same, task[by_kind[:-1]], START)
    for own in (slot == 0, slot > 0):
        nothing = np.zeros(np.count_nonzero(own), dtype=np.int64)
        yield Inputs(task[own], before[own], nothing + no_edge, nothing)


def _data_inputs(
    tasks: TaskArrays, stages: tuple[Stage, ...], edges: tuple[Edge, ...]
) -> Iterator[Inputs]:
    """Tasks that make the inputs: all tasks' first one, then the others."""
    number = {stage: index for index, stage in enumerate(stages)}
    # Forward passes wait for what comes into a stage, backward passes for what went out.
    waits: list[list[int]] = [[] for _ in range(2 * len(stages))]
    ends = np.zeros((2, len(edges) + 1), dtype=np.int64)
    for e, edge in enumerate(edges):
        ends[0, e], ends[1, e] = number[Stage(*edge[:2])], number[Stage(*edge[2:])]
        waits[ends[1, e]].append(e)
        waits[len(stages) + ends[0, e]].append(e)
    maker = _task_of_microbatch(tasks, len(stages))
    slots = _padded(waits)[:, tasks.stage + len(stages) * tasks.backward]
    last = tasks.first + tasks.count - 1
    for s, edge in enumerate(slots):
        own = np.flatnonzero(edge >= 0)
        backward, there = tasks.backward[own], edge[own]
        before = maker[backward, ends[backward, there], last[own]]
        passed = last[own] - tasks.first[before] + 1
        if s:
            yield Inputs(own, before, there, passed)
            continue
        first = Inputs(
            np.arange(len(edge)), *(np.full_like(edge, n) for n in (START, len(edges), 0))
        )
        first.before[own], first.edge[own], first.passed[own] = before, there, passed
        yield first


def _padded(lists: list[list[int]]) -> Integers:
    """Lists as columns, at least one long, filled up with -1."""
    length = max(1, *map(len, lists)) if lists else 1
    return np.array([entries + [-1] * (length - len(entries)) for entries in lists]).T


def _spread(counts: Integers) -> tuple[Integers, Integers]:
    """Repeats every position as often as its count says, and numbers the repetitions."""
    index = np.arange(len(counts))
    if counts.size and counts.max() == 1:
        return index, np.zeros_like(index)
    index = np.repeat(index, counts)
    return index, np.arange(len(index)) - np.repeat(np.cumsum(counts) - counts, counts)


def _task_of_microbatch(tasks: TaskArrays, num_stages: int) -> Integers:
    """Position of the task of every pass, stage and microbatch."""
    index, offset = _spread(tasks.count)
    microbatch = tasks.first[index] + offset
    found = np.full((2, num_stages, int(microbatch.max(initial=0)) + 1), START)
    found[tasks.backward[index], tasks.stage[index], microbatch] = index
    return found


def _common_order(plan: Plan, schedule: Schedule) -> Iterator[Task]:
    """Yields every task once, after all that it waits for."""
    kinds = rank_kinds(plan)
    lists = [schedule.tasks[kind.ranks[0]] for kind in kinds]
    hosts = {s: [k for k, kind in enumerate(kinds) if s in kind.stages] for s in stage_order(plan)}
    into: dict[tuple[str, Stage], list[Stage]] = {}
    for edge in edges_of(plan):
        into.setdefault(("F", Stage(*edge[2:])), []).append(Stage(*edge[:2]))
        into.setdefault(("B", Stage(*edge[:2])), []).append(Stage(*edge[2:]))
    position = [0] * len(kinds)
    done: set[tuple[str, Stage, int]] = set()
    left = {task for tasks in lists for task in tasks}
    while left:
        num_left = len(left)
        for k, tasks in enumerate(lists):
            task = tasks[position[k]] if position[k] < len(tasks) else None
            if task is None:
                continue
            stage = Stage(task.module, task.stage)
            here = all(lists[other][position[other]] == task for other in hosts[stage])
            needed = into.get((task.kind, stage), [])
            if here and all((task.kind, s, m) in done for s in needed for m in task.microbatches):
                for other in hosts[stage]:
                    position[other] += 1
                done |= {(task.kind, stage, m) for m in task.microbatches}
                left.remove(task)
                yield task
        assert len(left) < num_left, "the schedule must be one that verify accepts"
