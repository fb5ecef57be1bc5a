"""Orders tasks that share machines: list scheduling, improved backwards and forwards."""

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from heapq import heapify, heappop, heappush
from typing import NamedTuple

_SAME_S = 1e-12
"""Times that differ by less differ by the rounding of sums alone."""

_SEQUENCES_A_LIST = 2

Waits = list[list[tuple[int, float]]]


class Work(NamedTuple):
    """Tasks, numbered from 0.

    Args:
        machines: Machines that each task occupies, all at the same time.
        length_s: How long.
        after: Tasks that wait for each, with the time from its end to their start at least.
        before: The same the other way round: tasks that each waits for.
    """

    machines: list[tuple[int, ...]]
    length_s: list[float]
    after: Waits
    before: Waits

    @classmethod
    def of(
        cls,
        machines: list[tuple[int, ...]],
        length_s: list[float],
        waits: Iterable[tuple[int, int, float]],
    ) -> "Work":
        """Work of which the second of a pair waits for the first, and some time."""
        after: Waits = [[] for _ in machines]
        before: Waits = [[] for _ in machines]
        for first, second, lag_s in waits:
            after[first].append((second, lag_s))
            before[second].append((first, lag_s))
        return cls(machines, length_s, after, before)

    @property
    def num_machines(self) -> int:
        """Machines, counted from 0 to the last that is used."""
        return 1 + max((machine for own in self.machines for machine in own), default=-1)

    def turned(self) -> "Work":
        """The same with time turned round."""
        return self._replace(after=self.before, before=self.after)


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


def best_sequence(work: Work, *, max_lists: int) -> Sequence:
    """Finds a short order, the same for the same work.

    The first list is by urgency: the longest way from a task to the end of all. Every other list
    runs in the other direction of time and starts first what the one before ended last, which
    closes gaps that one direction alone leaves. After each list its tasks are pulled, one by one,
    into the gaps that are left at its end of time.

    Args:
        work: What to order; no task waits for itself through others.
        max_lists: Lists that are made, at least one; it ends sooner when two bring nothing.

    Source:
        Lists: Graham, 1969, SIAM J. Appl. Math. 17(2); in both directions: Li and Willis, 1992,
        Eur. J. Oper. Res. 56(3); pulled into gaps: Valls, Ballestin and Quintanilla, 2005, Eur.
        J. Oper. Res. 165(2), "double justification".
    """
    best, num_useless = None, 0
    for found in _sequences(work, max_lists):
        if best is None or found.makespan_s < best.makespan_s - _SAME_S:
            best, num_useless = found, 0
        else:
            num_useless += 1
        if num_useless == 2 * _SEQUENCES_A_LIST:
            break
    assert best is not None, "max_lists must be >= 1"
    return best


def _sequences(work: Work, max_lists: int) -> Iterator[Sequence]:
    """Yields what every list leads to, before and after it is pulled together."""
    here, there = work, work.turned()
    urgency = tails_s(work)
    for number in range(max_lists):
        listed = run_list(here, urgency)
        pulled = pull(there, listed)
        is_backward = number % 2 == 1
        yield _mirrored(listed, work.length_s) if is_backward else listed
        yield pulled if is_backward else _mirrored(pulled, work.length_s)
        here, there, urgency = there, here, listed.ends_s


def tails_s(work: Work) -> list[float]:
    """Longest way from the start of every task to the end of all.

    Raises:
        AssertionError: Tasks wait for each other in a circle.
    """
    num_before = list(map(len, work.before))
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
    """Runs, on each machine that gets free, the most urgent task that can start there."""
    machines, length_s, after, before = work
    num_before, ready_s = list(map(len, before)), [0.0] * len(after)
    state = _Machines(work, urgency)
    # What happens when: a task becomes ready, or, as ~task, ends.
    events = [(0.0, task) for task, count in enumerate(num_before) if not count]
    heapify(events)
    ends_s = [0.0] * len(after)
    while events:
        until_s, touched = events[0][0] + _SAME_S, set[int]()
        while events and events[0][0] <= until_s:
            now_s, task = heappop(events)
            if task >= 0:
                state.offer(task)
                touched.update(machines[task])
                continue
            state.free(~task)
            touched.update(machines[~task])
            for other, lag_s in after[~task]:
                if now_s + lag_s > ready_s[other]:
                    ready_s[other] = now_s + lag_s
                num_before[other] -= 1
                if not num_before[other]:
                    heappush(events, (ready_s[other], other))
        for machine in sorted(touched):
            task = state.start(machine)
            if task is not None:
                ends_s[task] = now_s + length_s[task]
                heappush(events, (ends_s[task], ~task))
    return Sequence(state.started, max(ends_s, default=0.0), ends_s)


def pull(work: Work, turned: Sequence) -> Sequence:
    """Starts every task as early as gaps allow, those first that end last in turned time.

    Args:
        work: Tasks.
        turned: A sequence of the same work with time turned round.
    """
    machines, length_s, _, before = work
    # Of tasks that end together, one without length may wait for another.
    place = {task: position for position, task in enumerate(turned.tasks)}
    order = sorted(place, key=lambda task: (-turned.ends_s[task], -place[task]))
    used = [_Used([], []) for _ in range(work.num_machines)]
    starts_s, ends_s = [0.0] * len(order), [0.0] * len(order)
    for task in order:
        own = [used[machine] for machine in machines[task]]
        ready_s = max((ends_s[other] + lag_s for other, lag_s in before[task]), default=0.0)
        starts_s[task] = start_s = _first_gap_s(own, ready_s, length_s[task])
        ends_s[task] = start_s + length_s[task]
        for machine in own:
            position = bisect_right(machine.starts_s, start_s)
            machine.starts_s.insert(position, start_s)
            machine.ends_s.insert(position, ends_s[task])
    order.sort(key=lambda task: starts_s[task])
    return Sequence(order, max(ends_s, default=0.0), ends_s)


class _Used(NamedTuple):
    """When a machine is occupied: starts and ends, ascending."""

    starts_s: list[float]
    ends_s: list[float]


def _first_gap_s(machines: list[_Used], ready_s: float, length_s: float) -> float:
    """Earliest time from which all machines are free for as long as a task takes."""
    start_s, found_s = ready_s, -1.0
    while found_s != start_s:
        found_s = start_s
        for starts_s, ends_s in machines:
            position = bisect_right(starts_s, start_s + _SAME_S)
            if position and ends_s[position - 1] > start_s:
                start_s = ends_s[position - 1]
            until_s = start_s + length_s - _SAME_S
            while position < len(starts_s) and starts_s[position] < until_s:
                start_s = ends_s[position]
                until_s = start_s + length_s - _SAME_S
                position += 1
    return start_s


class _Machines:
    """Which machines are busy, and which tasks wait for them."""

    def __init__(self, work: Work, urgency: list[float]) -> None:
        self._of = work.machines
        self._urgency = urgency
        self._busy = [False] * work.num_machines
        self._waiting = [list[tuple[float, int]]() for _ in range(work.num_machines)]
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


def _mirrored(sequence: Sequence, length_s: list[float]) -> Sequence:
    """A sequence in turned time, read from its end."""
    tasks, makespan_s, ends_s = sequence
    starts_s = [end - length for end, length in zip(ends_s, length_s, strict=True)]
    return Sequence(tasks[::-1], makespan_s, [makespan_s - start for start in starts_s])
