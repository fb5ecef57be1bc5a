"""Whether a schedule runs to its end: which ranks meet, and who would wait for ever."""

from collections import defaultdict, deque
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


class _Meeting(NamedTuple):
    """A transfer or task that a fixed list of ranks, told apart by its first, does together."""

    subject: Transfer | Task
    first_rank: int


def blocked_ranks(plan: Plan, steps: Sequence[Sequence[Step]]) -> tuple[Blocked, ...]:
    """Runs all ranks' steps without durations and returns those that never finish.

    The rules are NCCL's at their strictest. A transfer ends when all participants of its
    communicator have posted it; posting does not wait and nothing is buffered. A task of a
    module with tensor or context parallelism runs when its whole group has come to it, because
    of the collectives inside.

    Args:
        steps: Steps of every rank. The participants of each edge must post its microbatches in
            one order: then a transfer that all of them have posted has none before it in a queue.
    """
    world = _World(plan, steps)
    ready = deque(range(len(steps)))
    while ready:
        ready.extend(world.advance(ready.popleft()))
    return tuple(world.blocked())


class _World:
    """All ranks, each somewhere in its steps."""

    def __init__(self, plan: Plan, steps: Sequence[Sequence[Step]]) -> None:
        self._steps = steps
        self._position = [0] * len(steps)
        self._on_edge = _members_by_edge(plan)
        self._in_group = _members_by_module(plan)
        self._arrived: defaultdict[_Meeting, set[int]] = defaultdict(set)
        self._waiting: defaultdict[_Meeting, list[int]] = defaultdict(list)

    def advance(self, rank: int) -> list[int]:
        """Runs a rank until it blocks or ends; returns the ranks that can go on because of it."""
        steps = self._steps[rank]
        freed: list[int] = []
        while self._position[rank] < len(steps):
            step = steps[self._position[rank]]
            members = self._members(step, rank)
            meeting = _Meeting(step[0], members[0])
            if not isinstance(step, Wait):
                self._arrived[meeting].add(rank)
            if len(self._arrived[meeting]) == len(members):
                freed += self._waiting.pop(meeting, [])
            elif not isinstance(step, Post):
                self._waiting[meeting].append(rank)
                break
            self._position[rank] += 1
        return freed

    def blocked(self) -> Iterator[Blocked]:
        """Ranks that have steps left, in ascending order."""
        for rank, steps in enumerate(self._steps):
            left = steps[self._position[rank] :]
            if left:
                members = self._members(left[0], rank)
                arrived = self._arrived[_Meeting(left[0][0], members[0])]
                task = next(step.task for step in left if isinstance(step, Compute))
                missing = tuple(member for member in members if member not in arrived)
                yield Blocked(rank, task, missing)

    def _members(self, step: Step, rank: int) -> tuple[int, ...]:
        if isinstance(step, Compute):
            return self._in_group[step.task.module, rank]
        return self._on_edge[step.transfer.edge, rank]


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
        for members in placement.groups("tp", "cp")
        for rank in members
    }
