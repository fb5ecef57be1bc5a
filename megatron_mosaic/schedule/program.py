"""A schedule as arrays: what every task waits for, with equal ranks folded."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from megatron_mosaic.errors import PlanError
from megatron_mosaic.layout.plan import Plan
from megatron_mosaic.schedule.graph import RankKind, Stage, rank_kinds, stage_order
from megatron_mosaic.schedule.parts import Link, Part, lanes_of_parts, links_of, parts_of
from megatron_mosaic.schedule.schedule import Schedule
from megatron_mosaic.schedule.steps import Edge, crosses_steps, edges_of
from megatron_mosaic.schedule.task import Task
from megatron_mosaic.schedule.task_arrays import Integers, TaskArrays

START = -1
"""Stands for a task before, where there is none."""


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


class LaneTasks(NamedTuple):
    """What ranks of a kind run in one of their lanes.

    Args:
        stages: Stages that run there.
        tasks: Positions of their tasks, in their order.
    """

    stages: tuple[Stage, ...]
    tasks: Integers


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Program:
    """What a simulation runs.

    Args:
        parts: Stages that ``tasks.stage`` counts; one whose replicas run apart is there for each
            part.
        lanes: Numbers of the lanes in which each part runs, one on each of its kinds of ranks;
            ranks that run one module at a time have one lane.
        edges: Edges that ``Inputs.edge`` counts.
        kinds: Ranks that host the same stages, and so have the same tasks; none that are idle.
        tasks: All tasks.
        rank: For every task, the one before it in its lane on the first kind of its ranks.
        data: For every task, where its first input comes from.
        others: What some tasks wait for besides: more kinds of ranks, more inputs.
    """

    parts: tuple[Part, ...]
    lanes: tuple[tuple[int, ...], ...]
    edges: tuple[Edge, ...]
    kinds: tuple[RankKind, ...]
    tasks: TaskArrays
    rank: Inputs
    data: Inputs
    others: Inputs

    @property
    def stages(self) -> tuple[Stage, ...]:
        """Stage of every part."""
        return tuple(part.stage for part in self.parts)

    def task(self, index: int) -> Task:
        """One task."""
        stage, backward, first, count = (int(column[index]) for column in self.tasks)
        kind = "B" if backward else "F"
        return Task(kind, *self.parts[stage].stage, tuple(range(first, first + count)))

    def tasks_of(self, kind: RankKind) -> Integers:
        """Positions of the tasks that ranks of a kind run, in their order."""
        number = self.kinds.index(kind)
        hosted = [p for p, part in enumerate(self.parts) if number in part.kinds]
        return np.flatnonzero(np.isin(self.tasks.stage, hosted))

    def lane_tasks(self, kind: RankKind) -> tuple[LaneTasks, ...]:
        """Lanes of ranks of a kind, those that feed others first; one where modules take turns."""
        number = self.kinds.index(kind)
        hosted: dict[int, list[int]] = {}
        for p, (part, lanes) in enumerate(zip(self.parts, self.lanes, strict=True)):
            if number in part.kinds:
                hosted.setdefault(lanes[part.kinds.index(number)], []).append(p)
        return tuple(
            LaneTasks(
                tuple(self.parts[p].stage for p in own),
                np.flatnonzero(np.isin(self.tasks.stage, own)),
            )
            for own in hosted.values()
        )

    def peak_live(self, stage: Stage) -> int:
        """Most tasks of a stage whose activations a rank holds at the same time."""
        own = [p for p, part in enumerate(self.parts) if part.stage == stage]
        return max(_peak(self.tasks.backward[self.tasks.stage == p]) for p in own)


def program_of(plan: Plan, schedule: Schedule) -> Program:
    """Makes the program of any schedule of a plan that ``verify`` accepts.

    Every stage must run its microbatches in ascending order, and ranks that host the same stages
    the same tasks, as all built schedules do. Where the lists of its ranks do not let all of a
    stage run a task together, or the schedule leaves them free, its replicas are parts.
    """
    kinds = rank_kinds(plan)
    number = {stage: index for index, stage in enumerate(stage_order(plan))}
    lists = []
    for kind in kinds:
        rows = [
            (number[Stage(module, stage)], kind_of_pass == "B", microbatches[0], len(microbatches))
            for kind_of_pass, module, stage, microbatches in schedule.tasks[kind.ranks[0]]
        ]
        lists.append(TaskArrays(*np.array(rows, dtype=np.int64).reshape(-1, 4).T))
    return program_of_lists(plan, lists, ahead=schedule.ahead, apart=schedule.receives_early)


def program_of_lists(
    plan: Plan, lists: Sequence[TaskArrays], *, ahead: frozenset[str], apart: bool
) -> Program:
    """Makes the program of lists of tasks.

    Args:
        plan: The plan.
        lists: Tasks of every kind of ranks; ``stage`` counts the plan's ``stage_order``.
        ahead: Modules that run a step ahead.
        apart: Whether replicas on ranks of several kinds may run a task each at its own time.

    Raises:
        PlanError: Ranks that host the same stages would wait for each other in a circle, although
            single ones would not.
    """
    kinds, found = rank_kinds(plan), None
    if not apart:
        parts = parts_of(plan, kinds, apart=False)
        found = _common_order(plan, lists, parts, ahead)
    if found is None:
        parts = parts_of(plan, kinds, apart=True)
        found = _common_order(plan, lists, parts, ahead)
    if found is None:
        raise PlanError(
            "schedule: order of tasks must let all ranks that host the same stages come to each "
            "task together; write them in one order common to these ranks"
        )
    return wire(plan, found, parts=parts, ahead=ahead)


def wire(
    plan: Plan,
    tasks: TaskArrays,
    *,
    parts: tuple[Part, ...] | None = None,
    ahead: frozenset[str] = frozenset(),
) -> Program:
    """Finds out what every task of a plan waits for.

    Args:
        plan: The plan.
        tasks: Tasks; ``stage`` counts the parts.
        parts: Parts of the plan's stages; by default every stage is one.
        ahead: Modules that run a step ahead.
    """
    edges, kinds = edges_of(plan), rank_kinds(plan)
    parts = parts_of(plan, kinds, apart=False) if parts is None else parts
    links = links_in_a_step(plan, kinds, parts, ahead)
    lanes = lanes_of_parts(plan, parts)
    rank, *more_ranks = _rank_inputs(tasks, lanes, no_edge=len(edges))
    data, *more_data = data_inputs(tasks, links, len(parts), no_edge=len(edges))
    others = [np.concatenate(column) for column in zip(*more_ranks, *more_data, strict=True)]
    order = np.argsort(others[0], kind="stable") if others else np.array([], dtype=np.int64)
    return Program(
        parts=parts,
        lanes=lanes,
        edges=edges,
        kinds=kinds,
        tasks=tasks,
        rank=rank,
        data=data,
        others=Inputs(*(column[order] for column in others or [order] * 4)),
    )


def links_in_a_step(
    plan: Plan, kinds: tuple[RankKind, ...], parts: tuple[Part, ...], ahead: frozenset[str]
) -> tuple[Link, ...]:
    """Pairs of parts of which one waits for the other: not for what was made a step before."""
    edges = edges_of(plan)
    return tuple(
        link for link in links_of(plan, kinds, parts) if not crosses_steps(ahead, edges[link.edge])
    )


def _peak(backward: Integers) -> int:
    """Most tasks between their passes; without backward passes each is gone when it ends."""
    return int(np.cumsum(1 - 2 * backward).max()) if backward.any() else min(len(backward), 1)


def _rank_inputs(
    tasks: TaskArrays, lanes: Sequence[Sequence[int]], *, no_edge: int
) -> Iterator[Inputs]:
    """Tasks before in the same lanes: all tasks' on their first kind of ranks, then on others."""
    hosts = list(map(list, lanes))
    # One row for every task and kind of ranks that runs it; `slot` counts those of one task.
    num_hosts = np.array([len(own) for own in hosts])[tasks.stage]
    task, slot = _spread(num_hosts)
    kind = _padded(hosts)[slot, tasks.stage[task]]
    by_kind = np.argsort(kind.astype(np.int32), kind="stable")
    same = kind[by_kind[1:]] == kind[by_kind[:-1]]
    before = np.full(len(task), START)
    before[by_kind[1:]] = np.where(same, task[by_kind[:-1]], START)
    for own in (slot == 0, slot > 0):
        nothing = np.zeros(np.count_nonzero(own), dtype=np.int64)
        yield Inputs(task[own], before[own], nothing + no_edge, nothing)


def data_inputs(
    tasks: TaskArrays, links: tuple[Link, ...], num_parts: int, *, no_edge: int
) -> Iterator[Inputs]:
    """Tasks that make the inputs: all tasks' first one, then the others."""
    # Forward passes wait for what comes into a part, backward passes for what went out.
    waits: list[list[int]] = [[] for _ in range(2 * num_parts)]
    for n, link in enumerate(links):
        waits[link.destination].append(n)
        waits[num_parts + link.source].append(n)
    edges, *ends = np.array([*links, (no_edge, 0, 0)]).T
    maker = _task_of_microbatch(tasks, num_parts)
    row = tasks.stage + num_parts * tasks.backward
    num_waits = np.array([len(own) for own in waits], dtype=np.int64)[row]
    ends_of_links = np.array(ends)
    last = tasks.first + tasks.count - 1
    for s, link_of_row in enumerate(_padded(waits)):
        own = np.flatnonzero(num_waits > s)
        backward, there = tasks.backward[own], link_of_row[row[own]]
        before = maker[backward, ends_of_links[backward, there], last[own]]
        passed = last[own] - tasks.first[before] + 1
        if s:
            yield Inputs(own, before, edges[there], passed)
            continue
        first = Inputs(np.arange(len(row)), *(np.full_like(row, n) for n in (START, no_edge, 0)))
        first.before[own], first.edge[own], first.passed[own] = before, edges[there], passed
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


def _common_order(
    plan: Plan, lists: Sequence[TaskArrays], parts: tuple[Part, ...], ahead: frozenset[str]
) -> TaskArrays | None:
    """Tasks of all parts, once each, after all that they wait for; None if some wait for ever."""
    place = {(part.stage, k): p for p, part in enumerate(parts) for k in part.kinds}
    stages = stage_order(plan)
    part_of = [
        np.array([place.get((stage, k), START) for stage in stages])[own.stage]
        for k, own in enumerate(lists)
    ]
    every = TaskArrays(*(np.concatenate(column) for column in zip(*lists, strict=True)))
    every = every._replace(stage=np.concatenate(part_of))
    # Kinds of ranks that run a task together have it in their lists each.
    num_microbatches = int((every.first + every.count).max(initial=0))
    key = (every.stage * 2 + every.backward) * num_microbatches + every.first
    _, index, task, copies = np.unique(
        key, return_index=True, return_inverse=True, return_counts=True
    )
    tasks = every.at(index)
    if (copies != np.array([len(part.kinds) for part in parts])[tasks.stage]).any():
        return None
    ends = np.cumsum([len(own.stage) for own in lists])
    neighbours = np.delete(np.arange(1, len(task)), ends[:-1] - 1)
    before, after = [task[neighbours - 1]], [task[neighbours]]
    links = links_in_a_step(plan, rank_kinds(plan), parts, ahead)
    for inputs in data_inputs(tasks, links, len(parts), no_edge=0):
        waits = inputs.before != START
        before.append(inputs.before[waits])
        after.append(inputs.task[waits])
    order = _sorted(np.concatenate(before), np.concatenate(after), num_tasks=len(index))
    return None if order is None else tasks.at(order)


def _sorted(before: Integers, after: Integers, *, num_tasks: int) -> Integers | None:
    """Positions of tasks, each behind those before it; None if there is a circle."""
    first = np.searchsorted(np.sort(before), np.arange(num_tasks + 1)).tolist()
    following = after[np.argsort(before, kind="stable")].tolist()
    num_before = np.bincount(after, minlength=num_tasks)
    order: list[int] = np.flatnonzero(num_before == 0).tolist()
    left = num_before.tolist()
    for task in order:
        for other in following[first[task] : first[task + 1]]:
            left[other] -= 1
            if not left[other]:
                order.append(other)
    return np.array(order, dtype=np.int64) if len(order) == num_tasks else None
