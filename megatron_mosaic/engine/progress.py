"""Where this rank is, in a few bytes that another process can read after it has died."""

import struct
import time
from collections.abc import Buffer, Sequence
from enum import IntEnum
from typing import NamedTuple

from megatron_mosaic.engine.trace import TaskRecorder
from megatron_mosaic.schedule.steps import Compute, Step

RECORD = struct.Struct("=9d")
UNKNOWN_S = -1.0


class Phase(IntEnum):
    """What a rank is at."""

    START = 0
    WALKING = 1  # the steps of the schedule: tasks and transfers
    CLOSING = 2  # the losses and gradients of a step, once its tasks are done
    BETWEEN = 3  # optimizer, saving, logging, data


class Place(NamedTuple):
    """Where a rank is.

    Args:
        phase: What it is at.
        count: Steps that it has begun, of training and of evaluation.
        iteration: Megatron's number of the training step, from 1.
        forward_only: Whether the step is one of evaluation.
        num_microbatches: Microbatches of the step; with ``forward_only`` they give the schedule.
        position: Index among the rank's steps of the schedule.
        since_s: When it came there, by this machine's monotonic clock.
        longest_s: Longest time that such a thing took in the step before of the same kind;
            ``UNKNOWN_S`` if there was none.
        part: What of the schedule the step walks, a ``Part``.
    """

    phase: int
    count: int
    iteration: int
    forward_only: int
    num_microbatches: int
    position: int
    since_s: float
    longest_s: float
    part: int = 0

    @classmethod
    def from_numbers(cls, numbers: Sequence[float]) -> "Place":
        """Makes a place of what a record or a message holds."""
        whole = [int(number) for number in numbers[:6]]
        return cls._make([*whole, *numbers[6:8], int(numbers[8])])


class Progress:
    """Follows a rank through its steps. The engine writes it, other threads read it.

    Costs a clock and a few bytes for every step of the schedule, and nothing of the device.

    Args:
        buffer: Holds ``RECORD``; a shared one outlives the process.
        trace: Records when the tasks run, if anybody wants to know.
    """

    def __init__(self, buffer: Buffer | None = None, *, trace: TaskRecorder | None = None) -> None:
        self._buffer = buffer if buffer is not None else bytearray(RECORD.size)
        self.trace = trace
        # Longest times of the last step and of this one, by kind of step and phase.
        self._before: dict[tuple[bool, Phase], float] = {}
        self._now: dict[tuple[bool, Phase], float] = {}
        self._forward_only = False
        self._set(Place(Phase.START, 0, 0, 0, 0, 0, time.monotonic(), UNKNOWN_S))

    @property
    def place(self) -> Place:
        """Where the rank is."""
        return self._place

    def begin_step(
        self, iteration: int, *, num_microbatches: int, forward_only: bool, part: int = 0
    ) -> None:
        """Begins a step of training, or one of evaluation after training step ``iteration``."""
        self._forward_only = forward_only
        for phase in (Phase.WALKING, Phase.CLOSING):
            if longest_s := self._now.pop((forward_only, phase), None):
                self._before[forward_only, phase] = longest_s
        if self.trace is not None:
            self.trace.begin_step(forward_only=forward_only, iteration=iteration)
        count = self._place.count + 1
        self._place = Place(
            Phase.WALKING, count, iteration, forward_only, num_microbatches, 0, 0.0, 0.0, part
        )
        self._move(Phase.WALKING, position=0)

    def begin(self, position: int, step: Step) -> None:
        """Comes to one of the rank's steps of the schedule."""
        self._move(Phase.WALKING, position=position)
        if self.trace is not None and isinstance(step, Compute):
            self.trace.begin_task()

    def end(self, step: Step) -> None:
        """Ends that step."""
        if isinstance(step, Compute):
            self._measure(Phase.WALKING)
            if self.trace is not None:
                self.trace.end_task(step.task)

    def close_step(self, num_steps: int) -> None:
        """Goes on to what follows the tasks: losses and gradients."""
        if self.trace is not None:
            self.trace.close_step()
        self._move(Phase.CLOSING, position=num_steps)

    def end_step(self) -> None:
        """Leaves the step to Megatron's loop."""
        if self.trace is not None:
            self.trace.end_step()
        self._measure(Phase.CLOSING)
        self._move(Phase.BETWEEN, position=self._place.position)

    def _measure(self, phase: Phase) -> None:
        key = (self._forward_only, phase)
        time_s = time.monotonic() - self._place.since_s
        self._now[key] = max(self._now.get(key, 0.0), time_s)

    def _move(self, phase: Phase, *, position: int) -> None:
        longest_s = self._before.get((self._forward_only, phase), UNKNOWN_S)
        _, count, iteration, forward_only, num_microbatches, _, _, _, part = self._place
        self._set(
            Place(
                phase,
                count,
                iteration,
                forward_only,
                num_microbatches,
                position,
                time.monotonic(),
                longest_s,
                part,
            )
        )

    def _set(self, place: Place) -> None:
        self._place = place
        RECORD.pack_into(self._buffer, 0, *place)
