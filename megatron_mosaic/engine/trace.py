"""Records when each task ran: for a file of its own, for telemetry, for the simulator."""

import json
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any, NamedTuple, Protocol, Self

import torch

from megatron_mosaic.schedule.task import Task

# How long the beginning of a step may look whether the device is idle, in seconds: an event on an
# idle GPU is passed after about 10 us, and a step takes at least a thousand times as long.
_LOOK_S = 50e-6


class Clock(Protocol):
    """Tells when the stream that computes, which is the current one, passes a point."""

    def begin_step(self) -> None:
        """Comes before the marks of every step."""
        ...

    def mark(self) -> Any:
        """Marks where the stream will be once it has done what it was given so far."""
        ...

    def seconds(self, mark: Any) -> float | None:
        """Unix time of a mark; None if it is not passed yet. Marks are read in their order."""
        ...

    def finish(self) -> None:
        """Blocks until all marks are passed."""
        ...


class HostClock:
    """The clock of a rank that computes on its host: tasks end as their calls do."""

    def __init__(self) -> None:
        # Steady within a run, whoever sets the time; and alike on all ranks, as far as their
        # machines agree on the time of day.
        self._offset_s = time.time() - time.monotonic()

    def begin_step(self) -> None:
        """Does nothing."""

    def mark(self) -> float:
        """Returns the time."""
        return self._offset_s + time.monotonic()

    def seconds(self, mark: float) -> float:
        """Returns the mark itself."""
        return mark

    def finish(self) -> None:
        """Does nothing."""


@dataclass(kw_only=True, slots=True)
class _Reference:
    """An event at the beginning of a step, whose host time other events are counted from."""

    event: Any
    host_s: float = 0.0
    before: "_Reference | None" = None  # if not None, the host time is not known yet

    def seconds(self) -> float:
        if self.before is not None:
            since_s = self.before.event.elapsed_time(self.event) / 1000
            self.host_s, self.before = self.before.seconds() + since_s, None
        return self.host_s


@dataclass(frozen=True, kw_only=True, slots=True)
class _DeviceMark:
    event: Any
    reference: _Reference


class DeviceClock:
    """The clock of a GPU: events on the stream that computes, read once they are passed.

    Nothing waits for the device but the first step's beginning, once. There a reference event
    meets the host's clock; so it does in every later step that finds the device idle, which keeps
    the clocks of ranks together in a long run. Where the device is still at work, the time since
    the step before is its own.

    Args:
        new_event: Makes an event with a time.
        synchronize: Waits for the device.
    """

    def __init__(
        self,
        *,
        new_event: Callable[[], Any] = lambda: torch.cuda.Event(enable_timing=True),
        synchronize: Callable[[], None] = lambda: torch.cuda.synchronize(),
    ) -> None:
        self._new_event = new_event
        self._synchronize = synchronize
        self._host = HostClock()
        self._reference: _Reference | None = None

    def begin_step(self) -> None:
        """Records the step's reference."""
        if self._reference is None:
            self._synchronize()
        event = self._new_event()
        host_s = self._host.mark()
        event.record()
        if self._reference is None or _passes_at_once(event):
            self._reference = _Reference(event=event, host_s=host_s)
        else:
            self._reference = _Reference(event=event, before=self._reference)

    def mark(self) -> _DeviceMark:
        """Records an event on the current stream."""
        assert self._reference is not None, "a step begins before its marks"
        event = self._new_event()
        event.record()
        return _DeviceMark(event=event, reference=self._reference)

    def seconds(self, mark: _DeviceMark) -> float | None:
        """Reads an event without waiting for it."""
        if not mark.event.query():
            return None
        return mark.reference.seconds() + mark.reference.event.elapsed_time(mark.event) / 1000

    def finish(self) -> None:
        """Waits for the device."""
        self._synchronize()


def _passes_at_once(event: Any) -> bool:
    until_s = time.monotonic() + _LOOK_S
    while not (passed := event.query()) and time.monotonic() < until_s:
        pass
    return passed


def remove_former_ranks(folder: Path, *, world_size: int) -> None:
    """Removes what a run on more ranks left in a folder: it would be read as of the same steps."""
    for path in folder.glob("rank*.jsonl"):
        number = path.stem.removeprefix("rank")
        if number.isdecimal() and int(number) >= world_size:
            path.unlink(missing_ok=True)


class TaskSpan(NamedTuple):
    """When a task ran, in Unix time."""

    task: Task
    start_s: float
    end_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class RecordedStep:
    """A training step of a rank, in Unix time.

    Args:
        number: Which of the recorded ones it is, from 0.
        begin_s: When it began.
        spans: Its tasks.
        walked_s: When its tasks and transfers were done; None where nobody said so.
        end_s: When its losses and gradients were reduced, too.
    """

    number: int
    begin_s: float
    spans: tuple[TaskSpan, ...]
    walked_s: float | None
    end_s: float | None


@dataclass(kw_only=True, slots=True)
class _Step:
    """Marks of a step."""

    number: int
    begin: Any
    tasks: list[tuple[Task, Any, Any]] = field(default_factory=list)
    walked: Any = None
    end: Any = None


def _every_step(iteration: int) -> bool:
    return True


class TaskRecorder:
    """Marks when the tasks of a rank run, and hands on whole steps.

    A step is read a step or more later, or when somebody asks, so that nothing waits for the
    device. Evaluation is not recorded.

    Args:
        clock: Of what computes.
        take: Gets each recorded step; the last one is kept in any case.
        wants: Tells of Megatron's number of a step whether it is recorded.
    """

    def __init__(
        self,
        *,
        clock: Clock,
        take: Callable[[RecordedStep], None] | None = None,
        wants: Callable[[int], bool] = _every_step,
    ) -> None:
        self._clock = clock
        self._take = take
        self._wants = wants
        self.last: RecordedStep | None = None
        self._steps: deque[_Step] = deque()
        self._num_steps = 0
        self._records = False
        self._start: Any = None
        self.began_s = 0.0
        """When the last step of training began, by the host's monotonic clock."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Hands on what is left; after an error only what needs no waiting."""
        if kind is None:
            self.finish()
            return
        # A device that has failed answers with its error once more: the first one counts.
        with suppress(RuntimeError):
            self._hand_on()

    def finish(self) -> None:
        """Waits until the device is done, and hands on all steps that have ended."""
        self._clock.finish()
        self._hand_on()

    def begin_step(self, *, forward_only: bool, iteration: int = 0) -> None:
        """Starts the next step."""
        self._hand_on()
        if not forward_only:
            self.began_s = time.monotonic()
        self._records = not forward_only and self._wants(iteration)
        if self._records:
            self._clock.begin_step()
            self._steps.append(_Step(number=self._num_steps, begin=self._clock.mark()))
            self._num_steps += 1

    def begin_task(self) -> None:
        """Marks the beginning of a task."""
        if self._records:
            self._start = self._clock.mark()

    def end_task(self, task: Task) -> None:
        """Marks its end."""
        if self._records:
            self._steps[-1].tasks.append((task, self._start, self._clock.mark()))

    def close_step(self) -> None:
        """Marks the end of the step's tasks and transfers."""
        if self._records:
            self._steps[-1].walked = self._clock.mark()

    def end_step(self) -> None:
        """Marks the end of what follows them."""
        if self._records:
            self._steps[-1].end = self._clock.mark()

    def _hand_on(self) -> None:
        while self._steps and (step := self._read(self._steps[0])) is not None:
            self.last = step
            if self._take is not None:
                self._take(step)
            self._steps.popleft()

    def _read(self, step: _Step) -> RecordedStep | None:
        """Reads the marks of a step; None if the device has not come so far."""
        marks = [step.begin, *(mark for _, *pair in step.tasks for mark in pair)]
        marks += [mark for mark in (step.walked, step.end) if mark is not None]
        times_s = [time_s for mark in marks if (time_s := self._clock.seconds(mark)) is not None]
        if len(times_s) < len(marks):
            return None
        begin_s, *rest_s = times_s
        num_tasks = len(step.tasks)
        pairs_s = zip(rest_s[: 2 * num_tasks : 2], rest_s[1 : 2 * num_tasks : 2], strict=True)
        last_s = iter(rest_s[2 * num_tasks :])
        return RecordedStep(
            number=step.number,
            begin_s=begin_s,
            spans=tuple(
                TaskSpan(task, *pair_s)
                for (task, *_), pair_s in zip(step.tasks, pairs_s, strict=True)
            ),
            walked_s=None if step.walked is None else next(last_s),
            end_s=None if step.end is None else next(last_s),
        )


class TaskTrace(TaskRecorder):
    """One file of JSON lines for a rank: step, task, begin and end in Unix time.

    Lines are written a whole step at a time.

    Args:
        folder: Where ``rank<r>.jsonl`` goes; it is made if need be.
        rank: Global rank.
        clock: Of what computes.

    Raises:
        OSError: The file cannot be written.
    """

    def __init__(self, folder: Path, *, rank: int, clock: Clock) -> None:
        super().__init__(clock=clock, take=self._write)
        folder.mkdir(parents=True, exist_ok=True)
        self._file: IO[str] = (folder / f"rank{rank}.jsonl").open("w", encoding="utf-8")

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Writes what is left; after an error only what needs no waiting."""
        with self._file:
            super().__exit__(kind, error, traceback)

    def _write(self, step: RecordedStep) -> None:
        entries = (
            {"step": step.number, **task._asdict(), "start_s": start_s, "end_s": end_s}
            for task, start_s, end_s in step.spans
        )
        self._file.write("".join(json.dumps(entry) + "\n" for entry in entries))
        self._file.flush()
