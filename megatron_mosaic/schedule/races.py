"""Finds steps of different lanes that touch the same memory without an event between them.

Every lane has a vector clock: of each lane, how much of its work has ended for sure where this one
stands. An event carries a clock from one lane to another. Two accesses of which one writes are a
race unless the clock of the second knows of the first.

Source: clocks and what is kept of accesses are those of DJIT+, as Flanagan and Freund describe
them, 2010, Commun. ACM 53(11), "FastTrack: Efficient and Precise Dynamic Race Detection".
"""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import NamedTuple

from megatron_mosaic.layout.plan import Plan
from megatron_mosaic.schedule.graph import Stage, stage_order
from megatron_mosaic.schedule.lanes import MAIN, Joins, LaneStep
from megatron_mosaic.schedule.steps import (
    Compute,
    Post,
    Step,
    Transfer,
    crosses_steps,
    edges_of,
    has_gradient,
    transfers_of,
)
from megatron_mosaic.schedule.task import Task

Event = Mapping[str, int]
"""What has ended for sure after a wait for the event: of each lane the work up to that number."""


class Access(NamedTuple):
    """Use of a piece of memory.

    Args:
        what: The piece.
        writes: Whether it may change it, or give it back.
    """

    what: Hashable
    writes: bool


class Race(NamedTuple):
    """Two accesses of which neither is sure to end before the other begins.

    Args:
        what: What both access.
        lane: Lane of the one that was launched later.
        other: Lane of the other one.
    """

    what: Hashable
    lane: str
    other: str

    def __str__(self) -> str:
        what = " ".join(map(str, self.what)) if isinstance(self.what, tuple) else self.what
        return f"lane {self.lane} uses {what} without waiting for lane {self.other}"


class VectorClocks:
    """Follows what lanes launch, in the order in which one thread launches it."""

    def __init__(self) -> None:
        self._clocks: dict[str, dict[str, int]] = {}
        # Of each piece of memory, the number of each lane's last write and of its last read.
        self._writes: dict[Hashable, dict[str, int]] = {}
        self._reads: dict[Hashable, dict[str, int]] = {}

    def record(self, lane: str) -> Event:
        """Returns an event of all that was launched in a lane so far."""
        clock = self._clock(lane)
        event = dict(clock)
        clock[lane] += 1
        return event

    def wait(self, lane: str, event: Event) -> None:
        """Lets what is launched in a lane from now on wait for an event."""
        clock = self._clock(lane)
        for other, number in event.items():
            clock[other] = max(clock.get(other, 0), number)

    def access(self, lane: str, what: Hashable, *, writes: bool) -> Race | None:
        """Notes that a lane uses a piece of memory; returns a race with an earlier use, if any."""
        clock = self._clock(lane)
        before = (self._writes, self._reads) if writes else (self._writes,)
        for uses in before:
            for other, number in uses.get(what, {}).items():
                if number > clock.get(other, 0):
                    return Race(what, lane, other)
        own = self._writes if writes else self._reads
        own.setdefault(what, {})[lane] = clock[lane]
        return None

    def _clock(self, lane: str) -> dict[str, int]:
        return self._clocks.setdefault(lane, {lane: 1})


def accesses(
    plan: Plan, steps: Iterable[Step], *, ahead: frozenset[str] = frozenset()
) -> list[tuple[Access, ...]]:
    """What each step of a rank reads and writes.

    A transfer's rows leave a task, are posted, arrive, and go into a task, each piece taken by
    the next. A task's activations live from its forward to its backward pass.

    Args:
        plan: The plan.
        steps: The steps.
        ahead: Modules that run a step ahead: what is posted of theirs was made before the steps,
            what they make is for the next ones.
    """
    edges = edges_of(plan)
    returning = frozenset(edge for edge in edges if has_gradient(plan, edge))
    at_stage = {
        stage: [edge for edge in edges if stage in edge.ends] for stage in stage_order(plan)
    }
    found: list[tuple[Access, ...]] = []
    for step in steps:
        if isinstance(step, Compute):
            own = at_stage[Stage(*step.task[1:3])]
            found.append(_of_task(step.task, *transfers_of(own, returning, step.task)))
        else:
            pieces = ("posted", "arrived")
            if isinstance(step, Post):
                kept = crosses_steps(ahead, step.transfer.edge)
                pieces = ("kept" if kept else "leaving", "posted")
            found.append(tuple(Access((piece, step.transfer), True) for piece in pieces))
    return found


def find_race(
    steps: Sequence[LaneStep], joined: Joins, used: Sequence[Iterable[Access]]
) -> Race | None:
    """Runs a rank's steps once and returns the first race.

    Between steps all memory is the training loop's: it writes to what the lanes will use before
    they begin, and after they have ended.

    Args:
        steps: The steps.
        joined: Waits between lanes and the training loop.
        used: What every step reads and writes.
    """
    clocks = VectorClocks()
    every = dict.fromkeys(access.what for own in used for access in own)
    for what in every:
        clocks.access(MAIN, what, writes=True)
    begin = clocks.record(MAIN)
    for lane in joined.begin:
        clocks.wait(lane, begin)
    awaited = {before for step in steps for before in step.after}
    events: dict[int, Event] = {}
    for position, (step, own) in enumerate(zip(steps, used, strict=True)):
        for before in step.after:
            clocks.wait(step.lane, events[before])
        for what, writes in own:
            if race := clocks.access(step.lane, what, writes=writes):
                return race
        if position in awaited:
            events[position] = clocks.record(step.lane)
    for lane in joined.end:
        clocks.wait(MAIN, clocks.record(lane))
    found = (clocks.access(MAIN, what, writes=True) for what in every)
    return next((race for race in found if race), None)


def _of_task(
    task: Task, arriving: Iterable[Transfer], leaving: Iterable[Transfer]
) -> tuple[Access, ...]:
    backward = task.kind == "B"
    return (
        *(Access(("arrived", transfer), True) for transfer in arriving),
        *(Access(("leaving", transfer), True) for transfer in leaving),
        Access(("activations of", task._replace(kind="F")), True),
        Access(("weights of", task.module), False),
        *[Access(("gradients of", task.module), True)] * backward,
    )
