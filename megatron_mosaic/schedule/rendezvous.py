"""Whether a schedule runs to its end: which ranks meet, and who would wait for ever."""

from collections import Counter, defaultdict, deque
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from megatron_mosaic.layout.plan import Plan
from megatron_mosaic.schedule.steps import (
    Compute,
    Edge,
    Post,
    Step,
    Transfer,
    Wait,
    communicators,
    edges_of,
    participants,
)
from megatron_mosaic.schedule.task import Task


class Blocked(NamedTuple):
    """A rank that stands still.

    Args:
        rank: The rank.
        task: The task that it cannot start, or cannot run alone.
        missing: Ranks that have not come to where it waits.
    """

    rank: int
    task: Task
    missing: tuple[int, ...]


class _Meeting:
    """What a list of ranks does together: a transfer, or a task with collectives inside."""

    def __init__(self, members: tuple[int, ...]) -> None:
        self.members = members
        self.arrived: set[int] = set()
        self.waiting: list[int] = []


def blocked_ranks(plan: Plan, steps: Sequence[Sequence[Step]]) -> tuple[Blocked, ...]:
    """Runs all ranks' steps without durations and returns those that never finish.

    The rules are NCCL's at their strictest. A transfer ends when all participants of its
    communicator have posted it; posting does not wait and nothing is buffered. A task of a
    module with tensor, context or expert parallelism runs when its whole group has come to it,
    because of the collectives inside.

    Args:
        steps: Steps of every rank. The participants of each edge must post its microbatches in
            one order: then a transfer that all of them have posted has none before it in a queue.
    """
    world = _World(plan, steps)
    ready = deque(range(len(steps)))
    while ready:
        ready.extend(world.advance(ready.popleft()))
    return tuple(world.blocked())


def rows_finish(plan: Plan, rows: Sequence[Sequence[int]], steps: Sequence[Sequence[Step]]) -> bool:
    """Whether ranks run to their end if those of a row keep together.

    Each row waits for all rows that any of its ranks meets. That is stricter than what ranks do:
    True means that ``blocked_ranks`` finds none; after False it has to be asked.

    Args:
        plan: The plan.
        rows: Ranks that have the same steps; every rank is in one row.
        steps: Steps of every row; of each edge's microbatches in one order, as there.
    """
    row_of = {rank: number for number, ranks in enumerate(rows) for rank in ranks}
    met: defaultdict[tuple[str | Edge, int], set[int]] = defaultdict(set)
    for (place, rank), members in (
        *_members_by_module(plan).items(),
        *_members_by_edge(plan).items(),
    ):
        met[place, row_of[rank]].update(row_of[member] for member in members)
    position = [0] * len(rows)
    arrived: defaultdict[Transfer | Task, set[int]] = defaultdict(set)
    waiting: defaultdict[Transfer | Task, list[int]] = defaultdict(list)
    ready = deque(range(len(rows)))
    while ready:
        row = ready.popleft()
        while position[row] < len(steps[row]):
            step = steps[row][position[row]]
            subject = step[0]
            there = arrived[subject]
            if not isinstance(step, Wait) and row not in there:
                there.add(row)
                ready.extend(waiting.pop(subject, ()))
            place = step.task.module if isinstance(step, Compute) else step.transfer.edge
            if not isinstance(step, Post) and not met[place, row] <= there:
                waiting[subject].append(row)
                break
            position[row] += 1
    return all(at == len(own) for at, own in zip(position, steps, strict=True))


def needed_ranks(
    plan: Plan, steps: Sequence[Sequence[Step]], positions: Sequence[int]
) -> tuple[frozenset[int], ...]:
    """Returns for every rank the ranks that must go on before it can.

    A rank needs the senders of each transfer it waits for that have not posted it, and the ranks
    of its group that have not come to the task it is in. On a device that works asynchronously
    the host runs ahead of what it waits for, so what it has passed counts as well: there, a task
    is done when no rank of the group is in it or before it. A rank that has ended its steps
    needs all that have not.

    Args:
        steps: Steps of every rank.
        positions: Step that each rank is at; its number of steps, or more, where it has ended.
    """
    in_group, on_edge = _members_by_module(plan), _members_by_edge(plan)
    # A rank is through with a transfer once it has posted it, with a task once it has ended it.
    numbered = [_numbered(own) for own in steps]
    at = [
        {key: index for index, key in enumerate(keys) if not isinstance(own[index], Wait)}
        for own, keys in zip(steps, numbered, strict=True)
    ]
    unfinished = {rank for rank, own in enumerate(steps) if positions[rank] < len(own)}

    def needed(rank: int) -> Iterator[int]:
        if rank not in unfinished:
            yield from unfinished
        for index, step in enumerate(steps[rank][: positions[rank] + 1]):
            key = numbered[rank][index]
            if isinstance(step, Wait):
                senders = _senders(plan, step.transfer)
                others = [m for m in on_edge[step.transfer.edge, rank] if m in senders]
                margin = 1
            elif isinstance(step, Compute):
                others, margin = in_group[step.task.module, rank], int(index < positions[rank])
            else:
                continue
            yield from (m for m in others if positions[m] < at[m].get(key, -1) + margin)

    return tuple(frozenset(needed(rank)) - {rank} for rank in range(len(steps)))


def _numbered(steps: Sequence[Step]) -> list[tuple[Transfer | Task, int]]:
    """What each step is about, and how often it came before.

    Modules that run ahead do the same twice in the first step: for itself and for the next one.
    """
    seen: Counter[tuple[type[Step], Transfer | Task]] = Counter()
    numbered = []
    for step in steps:
        numbered.append((step[0], seen[type(step), step[0]]))
        seen[type(step), step[0]] += 1
    return numbered


def _senders(plan: Plan, transfer: Transfer) -> tuple[int, ...]:
    sources, destinations = participants(plan, transfer.edge)
    return sources if transfer.kind == "activation" else destinations


class _World:
    """All ranks, each somewhere in its steps."""

    def __init__(self, plan: Plan, steps: Sequence[Sequence[Step]]) -> None:
        self._steps = steps
        self._position = [0] * len(steps)
        self._meetings = list(_meetings(plan, steps))

    def advance(self, rank: int) -> list[int]:
        """Runs a rank until it blocks or ends; returns the ranks that can go on because of it."""
        steps, meetings = self._steps[rank], self._meetings[rank]
        freed: list[int] = []
        while self._position[rank] < len(steps):
            step, meeting = steps[self._position[rank]], meetings[self._position[rank]]
            if not isinstance(step, Wait):
                meeting.arrived.add(rank)
            if len(meeting.arrived) == len(meeting.members):
                freed += meeting.waiting
                meeting.waiting.clear()
            elif not isinstance(step, Post):
                meeting.waiting.append(rank)
                break
            self._position[rank] += 1
        return freed

    def blocked(self) -> Iterator[Blocked]:
        """Ranks that have steps left, in ascending order."""
        for rank, position in enumerate(self._position):
            left = self._steps[rank][position:]
            if left:
                meeting = self._meetings[rank][position]
                task = next(step.task for step in left if isinstance(step, Compute))
                missing = tuple(m for m in meeting.members if m not in meeting.arrived)
                yield Blocked(rank, task, missing)


def _meetings(plan: Plan, steps: Sequence[Sequence[Step]]) -> Iterator[list[_Meeting]]:
    """For every rank the meetings of its steps; ranks that meet share the object."""
    on_edge, in_group = _members_by_edge(plan), _members_by_module(plan)
    met: dict[tuple[Transfer | Task, int], _Meeting] = {}
    for rank, steps_of_rank in enumerate(steps):
        meetings = []
        for step in steps_of_rank:
            if isinstance(step, Compute):
                members = in_group[step.task.module, rank]
            else:
                members = on_edge[step.transfer.edge, rank]
            key = step[0], members[0]
            if key not in met:
                met[key] = _Meeting(members)
            meetings.append(met[key])
        yield meetings


def _members_by_edge(plan: Plan) -> dict[tuple[Edge, int], tuple[int, ...]]:
    return {
        (edge, rank): members
        for edge in edges_of(plan)
        for members in communicators(plan, edge)
        for rank in members
    }


def _members_by_module(plan: Plan) -> dict[tuple[str, int], tuple[int, ...]]:
    return {
        (name, rank): members
        for name, placement in plan.modules.items()
        for members in placement.task_groups()
        for rank in members
    }
