"""Walks the steps of a rank whose modules run at the same time, each in a lane of its own.

One thread launches all of them, in the order of the schedule. So what meets other ranks meets them
in the order that was verified, and only the work itself overlaps.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from megatron_mosaic.comm.pending import Pending
from megatron_mosaic.engine.progress import Progress
from megatron_mosaic.engine.walk import Channels, Rows, TaskRunner, Walker
from megatron_mosaic.layout.plan import Plan
from megatron_mosaic.schedule.alone import alone_tasks
from megatron_mosaic.schedule.graph import Stage
from megatron_mosaic.schedule.lanes import Joins, LaneStep, joins, lane_steps
from megatron_mosaic.schedule.races import Access, accesses
from megatron_mosaic.schedule.schedule import Schedule
from megatron_mosaic.schedule.steps import Step, Transfer, Wait
from megatron_mosaic.sharing.lane import Lane, Lanes


@dataclass(frozen=True, kw_only=True, slots=True)
class LaneWalk:
    """What a rank walks at a time, in lanes.

    Args:
        steps: The steps.
        joined: Events between the lanes and the training loop around them.
        uses: What every step reads and writes, where races are looked for; else empty.
    """

    steps: tuple[LaneStep, ...]
    joined: Joins
    uses: tuple[tuple[Access, ...], ...] = ()


def in_lanes(
    plan: Plan, schedule: Schedule, steps: Sequence[Step], rank: int, *, races: bool
) -> LaneWalk:
    """Puts a rank's steps into lanes.

    Args:
        plan: The plan.
        schedule: The schedule that the steps are of.
        steps: The steps.
        rank: The rank.
        races: Whether races are looked for while they run.
    """
    alone = alone_tasks(plan, schedule, rank)
    lane_of_steps = lane_steps(plan, steps, rank, alone=alone, ahead=schedule.ahead)
    return LaneWalk(
        steps=lane_of_steps,
        joined=joins(lane_of_steps),
        uses=tuple(accesses(plan, steps, ahead=schedule.ahead)) if races else (),
    )


class LaneWalker(Walker):
    """Executes one rank's steps once, each in its lane.

    Args:
        lanes: Lanes of this rank.
        runners: Stages on this rank.
        channels: Edges that begin or end on this rank.
        progress: Is told where the rank is.
        schedule: The schedule that the steps are of.
        kept: What modules that run ahead made of this step's samples before it began.
    """

    def __init__(
        self,
        *,
        lanes: Lanes,
        runners: Mapping[Stage, TaskRunner],
        channels: Channels,
        progress: Progress,
        schedule: Schedule,
        kept: Rows,
    ) -> None:
        super().__init__(
            runners=runners, channels=channels, progress=progress, schedule=schedule, kept=kept
        )
        self._lanes = lanes
        self._lane = lanes.main
        self._lane_of_wait: dict[Transfer, Lane] = {}

    def walk_in_lanes(self, walk: LaneWalk, *, first: int = 0) -> Rows:
        """Launches all steps in order.

        Args:
            walk: The steps.
            first: Position of the first of them, for whoever follows the rank.

        Returns:
            What modules that run ahead made for the next step.

        Note:
            Their work may not be done yet. What the training loop launches next waits for it.
        """
        main, named = self._lanes.main, self._lanes.named
        self._expect([step for step, *_ in walk.steps])
        self._lane_of_wait = {
            each.step.transfer: named[each.lane]
            for each in walk.steps
            if isinstance(each.step, Wait)
        }
        everything = {access._replace(writes=True) for own in walk.uses for access in own}
        self._access(main, everything)
        begin = main.record()
        for name in walk.joined.begin:
            named[name].wait(begin)
        self._launch(walk, first=first)
        self._finish()
        for name in walk.joined.end:
            main.wait(named[name].record())
        self._access(main, everything)
        return self._ahead

    def _launch(self, walk: LaneWalk, *, first: int) -> None:
        awaited = {before for each in walk.steps for before in each.after}
        events: dict[int, Any] = {}
        for position, (step, name, after, whole) in enumerate(walk.steps):
            self._lane = lane = self._lanes.named[name]
            for before in after:
                lane.wait(events[before])
            if walk.uses:
                self._access(lane, walk.uses[position])
            with lane.active(whole=whole):
                self._step(first + position, step)
            if position in awaited:
                events[position] = lane.record()

    def _access(self, lane: Lane, uses: Iterable[Access]) -> None:
        """Stops at a race, where somebody looks for any: a schedule that was verified has none."""
        if (races := self._lanes.races) is not None:
            for what, writes in uses:
                race = races.access(lane.name, what, writes=writes)
                assert race is None, f"schedule: {race}"

    def _open(self, transfer: Transfer, leaving: torch.Tensor | None) -> Pending:
        pending = super()._open(transfer, leaving)
        if leaving is not None:
            self._lane.hold(leaving)  # what encoders made ahead is posted in the lane that uses it
        return _PendingInLane(
            pending,
            posted=self._lane,
            waits=self._lane_of_wait.get(transfer, self._lane),
        )


class _PendingInLane:
    """A transfer that was posted in one lane and may be waited for in another.

    Its buffers belong to the lane that posted it: the allocator gives their memory to the next
    work of that lane as soon as nobody refers to them. Whoever waits in another lane makes only
    that one wait for the transfer, and goes on reading what arrived. So they are held until the
    other lane is done with them. A transfer that nobody waits for ends where it was posted.
    """

    def __init__(self, pending: Pending, *, posted: Lane, waits: Lane) -> None:
        self._pending = pending
        self._posted = posted
        self._waits = waits

    def wait(self) -> torch.Tensor:
        """Makes the lane that waits, which is active, wait for the transfer."""
        if self._waits is self._posted:
            return self._pending.wait()
        buffers = self._pending.buffers()
        arrived = self._pending.wait()
        for tensor in (*buffers, arrived):
            self._waits.hold(tensor)
        return arrived

    def buffers(self) -> Sequence[torch.Tensor]:
        """Memory that the transfer uses on this rank."""
        return self._pending.buffers()

    def is_done(self) -> bool:
        """Tells, without waiting, whether nothing is under way any more."""
        return self._pending.is_done()

    def finish(self) -> None:
        """Makes the lane that posted the transfer wait for its end."""
        with self._posted.active():
            self._pending.finish()


@contextmanager
def inside(lanes: Lanes | None, name: str) -> Iterator[None]:
    """Launches in a lane what the training loop launches inside; without lanes in its own.

    It comes between what the loop launches before and what it launches after.
    """
    if lanes is None:
        yield
        return
    lane = lanes.named[name]
    lane.wait(lanes.main.record())
    with lane.active():
        yield
    lanes.main.wait(lane.record())
