"""Runs a program whose lanes work at the same time and hold each other up."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from heapq import heapify, heappop, heappush

import numpy as np
from numpy.typing import NDArray

from megatron_mosaic.schedule.program import START, Program

Seconds = NDArray[np.float64]
Slowdown = Callable[[tuple[int, ...]], Sequence[float]]

_STARTS = -1  # stands for the version of an end


def co_run(
    program: Program, *, solo_s: Seconds, edge_s: Seconds, slowdown: Slowdown
) -> tuple[Seconds, Seconds]:
    """Runs a program event by event, at speeds that hold from one event to the next.

    Args:
        program: Tasks and what they wait for.
        solo_s: Time of every task with nothing beside it; ``[tasks]``.
        edge_s: Of one microbatch over each edge, and 0 at the end; ``[edges + 1]``.
        slowdown: For passes at work on a rank, twice the part plus one if backward, how many
            times as long each takes because of the others. Asked once for the same passes.

    Returns:
        When every task starts, and when it ends.
    """
    after, num_before = _successors(program, edge_s)
    work = _Work(program, solo_s, cache(slowdown))
    ready_s = [0.0] * len(solo_s)
    # When a task starts; or, with the version of its end that holds, ends.
    events = [(0.0, task, _STARTS) for task, count in enumerate(num_before) if not count]
    heapify(events)
    while events:
        now_s = events[0][0]
        while events and events[0][0] == now_s:
            _, task, version = heappop(events)
            if version == _STARTS:
                work.start(task, now_s)
            elif work.end(task, version, now_s):
                for other, lag_s in after[task]:
                    ready_s[other] = max(ready_s[other], now_s + lag_s)
                    num_before[other] -= 1
                    if not num_before[other]:
                        heappush(events, (ready_s[other], other, _STARTS))
        for event in work.new_ends(now_s):
            heappush(events, event)
    return np.array(work.starts_s), np.array(work.ends_s)


class _Work:
    """Tasks at work, and when each ends if nothing changes."""

    def __init__(self, program: Program, solo_s: Seconds, slowdown: Slowdown) -> None:
        self.starts_s: list[float] = [0.0] * len(solo_s)
        self.ends_s: list[float] = [0.0] * len(solo_s)
        self._slowdown = slowdown
        self._part: list[int] = program.tasks.stage.tolist()
        self._pass: list[int] = (2 * program.tasks.stage + program.tasks.backward).tolist()
        self._kinds = [part.kinds for part in program.parts]
        self._at_work: list[list[int]] = [[] for _ in program.kinds]
        self._touched: set[int] = set()
        # Work that was left at a time, and how many times as long it takes since.
        self._left_s: list[float] = solo_s.tolist()
        self._since_s = [0.0] * len(solo_s)
        self._factor = [0.0] * len(solo_s)
        self._version = [0] * len(solo_s)

    def start(self, task: int, now_s: float) -> None:
        """Puts a task to work."""
        self.starts_s[task] = now_s
        for kind in self._kinds[self._part[task]]:
            self._at_work[kind].append(task)
            self._touched.add(kind)

    def end(self, task: int, version: int, now_s: float) -> bool:
        """Ends a task, unless it ends at another time by now."""
        if version != self._version[task]:
            return False
        self.ends_s[task] = now_s
        for kind in self._kinds[self._part[task]]:
            self._at_work[kind].remove(task)
            self._touched.add(kind)
        return True

    def new_ends(self, now_s: float) -> Iterator[tuple[float, int, int]]:
        """Yields ends, with their versions, of tasks whose speed has changed."""
        touched = {task for kind in self._touched for task in self._at_work[kind]}
        self._touched.clear()
        for task in sorted(touched):
            factor = max(self._factor_on(kind, task) for kind in self._kinds[self._part[task]])
            if factor == self._factor[task]:
                continue
            if self._factor[task]:
                self._left_s[task] -= (now_s - self._since_s[task]) / self._factor[task]
            self._since_s[task], self._factor[task] = now_s, factor
            self._version[task] += 1
            yield now_s + max(self._left_s[task], 0.0) * factor, task, self._version[task]

    def _factor_on(self, kind: int, task: int) -> float:
        """How many times as long a task takes because of what is at work on ranks of a kind."""
        if len(self._at_work[kind]) == 1:
            return 1.0
        tasks = sorted(self._at_work[kind], key=self._pass.__getitem__)
        return self._slowdown(tuple(self._pass[own] for own in tasks))[tasks.index(task)]


def _successors(
    program: Program, edge_s: Seconds
) -> tuple[list[list[tuple[int, float]]], list[int]]:
    """Tasks that wait for each, with the time on the way, and how many each waits for."""
    after: list[list[tuple[int, float]]] = [[] for _ in program.tasks.stage]
    num_before = [0] * len(after)
    for inputs in (program.rank, program.data, program.others):
        lags_s = edge_s[inputs.edge] * inputs.passed
        columns: Iterable[list[float]] = map(np.ndarray.tolist, (*inputs[:2], lags_s))
        for task, before, lag_s in zip(*columns, strict=True):
            if before != START:
                after[before].append((task, lag_s))
                num_before[task] += 1
    return after, num_before
