"""Orders tasks that share machines: list scheduling, improved backwards and forwards."""

from heapq import heapify, heappop, heappush
from typing import NamedTuple

_SAME_S = 1e-12
"""Times that differ by less differ by the rounding of sums alone."""

After = list[list[tuple[int, float]]]


class Work(NamedTuple):
    """Tasks, numbered from 0.

    Args:
        machines: Machines that each task occupies, all at the same time.
        length_s: How long.
        after: Tasks that wait for each, with the time from its end to their start at least.
    """

    machines: list[tuple[int, ...]]
    length_s: list[float]
    after: After


class Sequence(NamedTuple):
    """Tasks in the order in which they start.

    Args:
        tasks: Every task once, after all that it waits for.
        makespan_s: When the last one ends.
        ends_s: When each task ends, by its number.
    """

    tasks: list[int]
    makespan_s: float
    ends_s: list[float]


def best_sequence(work: Work, *, max_rounds: int) -> Sequence:
    """Finds a short order, the same for the same work.

    The first list is by urgency: the longest way from a task to the end of all. Then the tasks
    are listed backwards in time, those that ended last first, and forwards again, those that
    start first in the backward order first. That closes gaps which one direction alone leaves.

    Args:
        work: What to order; no task waits for itself through others.
        max_rounds: Times that both directions are run, at most; it ends sooner when a round
            brings nothing.

    Source:
        Graham, 1969, SIAM J. Appl. Math. 17(2), for lists; Li and Willis, 1992, Eur. J. Oper.
        Res. 56(3), for lists in both directions.
    """
    back = Work(work.machines, work.length_s, _turned(work.after))
    best = forward = run_list(work, tails_s(work))
    for _ in range(max_rounds):
        backward = run_list(back, forward.ends_s)
        forward = run_list(work, backward.ends_s)
        # The backward order is one too, read from its end.
        mirrored = Sequence(backward.tasks[::-1], backward.makespan_s, [])
        found = min(forward, mirrored, key=lambda sequence: sequence.makespan_s)
        if found.makespan_s > best.makespan_s - _SAME_S:
            break
        best = found
    return best


def tails_s(work: Work) -> list[float]:
    """Longest way from the start of every task to the end of all.

    Raises:
        AssertionError: Tasks wait for each other in a circle.
    """
    num_before = _num_before(work)
    order = [task for task, count in enumerate(num_before) if not count]
    for task in order:
        for other, _ in work.after[task]:
            num_before[other] -= 1
            if not num_before[other]:
                order.append(other)
    assert len(order) == len(work.after), "the tasks must not wait for each other in a circle"
    tails = list(work.length_s)
    for task in reversed(order):
        tails[task] += max((lag + tails[other] for other, lag in work.after[task]), default=0.0)
    return tails


def run_list(work: Work, urgency: list[float]) -> Sequence:
    """Runs at any time the most urgent tasks that are ready, on machines that are free."""
    machines, length_s, after = work
    num_before, ready_s = _num_before(work), [0.0] * len(after)
    state = _Machines(work, urgency)
    # What happens when: a task becomes ready, or, as ~task, ends.
    events = [(0.0, task) for task, count in enumerate(num_before) if not count]
    heapify(events)
    ends_s = [0.0] * len(after)
    while events:
        now_s, touched = events[0][0], set[int]()
        while events and events[0][0] <= now_s + _SAME_S:
            _, task = heappop(events)
            if task >= 0:
                state.offer(task)
                touched.update(machines[task])
                continue
            state.free(~task)
            touched.update(machines[~task])
            for other, lag_s in after[~task]:
                ready_s[other] = max(ready_s[other], now_s + lag_s)
                num_before[other] -= 1
                if not num_before[other]:
                    heappush(events, (ready_s[other], other))
        for machine in sorted(touched):
            task = state.start(machine)
            if task is not None:
                ends_s[task] = now_s + length_s[task]
                heappush(events, (ends_s[task], ~task))
    return Sequence(state.started, max(ends_s, default=0.0), ends_s)


class _Machines:
    """Which machines are busy, and which tasks wait for them."""

    def __init__(self, work: Work, urgency: list[float]) -> None:
        num_machines = 1 + max((m for own in work.machines for m in own), default=-1)
        self._of = work.machines
        self._urgency = urgency
        self._busy = [False] * num_machines
        self._waiting = [list[tuple[float, int]]() for _ in range(num_machines)]
        self._is_started = [False] * len(work.machines)
        self.started: list[int] = []

    def offer(self, task: int) -> None:
        """Lets a task that is ready wait for its machines."""
        for machine in self._of[task]:
            heappush(self._waiting[machine], (-self._urgency[task], task))

    def free(self, task: int) -> None:
        """Takes back the machines of a task that has ended."""
        for machine in self._of[task]:
            self._busy[machine] = False

    def start(self, machine: int) -> int | None:
        """Starts the most urgent task of a free machine whose other machines are free, if any."""
        waiting, kept, found = self._waiting[machine], [], None
        while waiting and found is None and not self._busy[machine]:
            entry = heappop(waiting)
            if self._is_started[entry[1]]:
                continue  # by another of its machines
            if any(self._busy[other] for other in self._of[entry[1]]):
                kept.append(entry)
            else:
                found = entry[1]
        for entry in kept:
            heappush(waiting, entry)
        if found is not None:
            self._is_started[found] = True
            self.started.append(found)
            for other in self._of[found]:
                self._busy[other] = True
        return found


def _num_before(work: Work) -> list[int]:
    """Tasks that each one waits for."""
    counts = [0] * len(work.after)
    for others in work.after:
        for other, _ in others:
            counts[other] += 1
    return counts


def _turned(after: After) -> After:
    """The same waits with time turned round."""
    before: After = [[] for _ in after]
    for task, others in enumerate(after):
        for other, lag_s in others:
            before[other].append((task, lag_s))
    return before
