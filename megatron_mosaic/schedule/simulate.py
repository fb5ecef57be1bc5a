"""When every task of a schedule starts and ends, from the durations of tasks and transfers."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from megatron_mosaic.schedule.alone import is_alone
from megatron_mosaic.schedule.co_run import Seconds, Slowdown, co_run
from megatron_mosaic.schedule.graph import RankKind, Stage
from megatron_mosaic.schedule.program import Program
from megatron_mosaic.schedule.steps import Edge
from megatron_mosaic.schedule.task import Task

_NOTHING: list[tuple[int, float]] = []


class PassTimes(NamedTuple):
    """Time of a stage's tasks."""

    forward_s: float
    backward_s: float


class Pass(NamedTuple):
    """One of the two passes of a stage."""

    stage: Stage
    backward: bool


class LaneTimes(NamedTuple):
    """What modules that run at the same time make of each other's times.

    Args:
        shared_s: Time of a stage's longest task with the module's quota, and nothing beside it.
        slowdown: For the passes at work on a rank at one moment, how many times as long as that
            each takes because of the others.
    """

    shared_s: Mapping[Stage, PassTimes]
    slowdown: Callable[[tuple[Pass, ...]], tuple[float, ...]]


class Span(NamedTuple):
    """When a task runs."""

    task: Task
    start_s: float
    end_s: float


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Timeline:
    """A simulated step.

    Args:
        program: What ran.
        start_s: When each of the program's tasks starts.
        end_s: When it ends.
    """

    program: Program
    start_s: Seconds
    end_s: Seconds

    @property
    def makespan_s(self) -> float:
        """When the last task ends."""
        return float(self.end_s.max(initial=0.0))

    def busy_s(self, kind: RankKind) -> float:
        """Time in which ranks of a kind run tasks; once where several run at the same time."""
        own = self.program.tasks_of(kind)
        return covered_s(self.start_s[own], self.end_s[own])

    def bubble_s(self, kind: RankKind) -> float:
        """Time in which ranks of a kind wait."""
        return self.makespan_s - self.busy_s(kind)

    def spans(self, kind: RankKind) -> Iterator[Span]:
        """Yields the tasks of ranks of a kind in their order."""
        for index in self.program.tasks_of(kind):
            yield Span(
                self.program.task(index), float(self.start_s[index]), float(self.end_s[index])
            )


def covered_s(start_s: Seconds, end_s: Seconds) -> float:
    """Time in which at least one of several spans lasts."""
    order = np.argsort(start_s, kind="stable")
    start_s, end_s = start_s[order], end_s[order]
    # Of every span what comes after the ends of those that started before it.
    start_s[1:] = np.maximum(start_s[1:], np.maximum.accumulate(end_s)[:-1])
    return float(np.maximum(end_s - start_s, 0.0).sum())


def simulate(
    program: Program,
    *,
    tasks_s: Mapping[Stage, PassTimes],
    transfers_s: Mapping[Edge, float] | None = None,
    lanes: LaneTimes | None = None,
) -> Timeline:
    """Runs a program.

    A task starts when its lane is free on all ranks that run it and its inputs have arrived. A
    transfer occupies no lane; those of one task go one microbatch after the other, and do not
    wait for those of the task before. Tasks of several ranks go at the speed of the slowest.

    Args:
        program: Tasks and what they wait for.
        tasks_s: Of a stage's longest task on the whole GPU; a shorter one, with fewer
            microbatches, takes time in proportion.
        transfers_s: Of one microbatch over an edge, either way; 0 where there is none.
        lanes: Of tasks that others can run beside; by default they do not mind each other.
    """
    over = transfers_s or {}
    edge_s = np.array([*(over.get(edge, 0.0) for edge in program.edges), 0.0])
    duration_s = _durations(program, tasks_s)
    if lanes is None:
        ends_s = _ends(program, edge_s, duration_s)
        return Timeline(program=program, start_s=ends_s - duration_s, end_s=ends_s)
    starts_s, ends_s = co_run(
        program,
        solo_s=np.where(is_alone(program), duration_s, _durations(program, lanes.shared_s)),
        edge_s=edge_s,
        slowdown=_slowdown(program, lanes),
    )
    return Timeline(program=program, start_s=starts_s, end_s=ends_s)


def _durations(program: Program, tasks_s: Mapping[Stage, PassTimes]) -> Seconds:
    stage, backward, _, count = program.tasks
    table = np.array([tasks_s[part.stage] for part in program.parts])
    longest = np.ones(len(program.parts), dtype=np.int64)
    np.maximum.at(longest, stage, count)
    return table[stage, backward] * (count / longest[stage])


def _slowdown(program: Program, lanes: LaneTimes) -> Slowdown:
    """The same of numbered passes: each is twice its part, plus one if backward."""
    passes = [Pass(part.stage, backward) for part in program.parts for backward in (False, True)]
    return lambda numbers: lanes.slowdown(tuple(passes[number] for number in numbers))


def _ends(program: Program, edge_s: Seconds, duration_s: Seconds) -> Seconds:
    """Ends of all tasks: one pass in their order, as each comes after those it waits for."""
    data, others = program.data, program.others
    more: list[list[tuple[int, float]]] = [_NOTHING] * len(duration_s)
    lags_s = edge_s[others.edge] * others.passed
    for task, before, lag_s in zip(*map(np.ndarray.tolist, (*others[:2], lags_s)), strict=True):
        more[task] = [*more[task], (before + 1, lag_s)]
    # The first entry is the beginning of the step, the one before the first task.
    ends = [0.0]
    add_end = ends.append
    columns = program.rank.before + 1, data.before + 1, edge_s[data.edge] * data.passed, duration_s
    for on_rank, source, lag_s, length_s, waits in zip(
        *map(np.ndarray.tolist, columns), more, strict=True
    ):
        start_s = ends[on_rank]
        arrival_s = ends[source] + lag_s
        if arrival_s > start_s:
            start_s = arrival_s
        if waits:
            start_s = max(start_s, *(ends[before] + lag_s for before, lag_s in waits))
        add_end(start_s + length_s)
    return np.array(ends[1:])
