"""Watches over all ranks while a plan runs: if one is lost, every other says so and ends.

A rank that is blocked in a collective cannot be reached from Python, so two threads do it. One
talks with the rendezvous store; the other decides, for the first may be blocked as well when the
machine of the store is gone. Neither takes part in a collective nor touches the device.

A thread runs only while the main thread lets go of the interpreter. A call into C that holds it
for longer than the limit of heartbeats looks like the loss of the rank.
"""

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from types import TracebackType

import torch.distributed as dist

from megatron_mosaic.engine.lost import Limits, Lost, Report, State, describe, find_lost
from megatron_mosaic.engine.progress import Progress
from megatron_mosaic.errors import HostError, LayoutError, PlanError
from megatron_mosaic.host.faults.bulletin import Bulletin
from megatron_mosaic.host.faults.dependence import error_communicates, frame_communicates
from megatron_mosaic.host.faults.record_file import RecordFile, read_record, remove_record
from megatron_mosaic.host.faults.termination import Termination
from megatron_mosaic.layout.plan import Plan
from megatron_mosaic.schedule.ahead import Part, steps_of_part
from megatron_mosaic.schedule.build import build_schedule
from megatron_mosaic.schedule.steps import Step, steps_of

_EXIT_LOST = 1
_EXIT_TERMINATED = 128 + 15  # as a shell calls an end by SIGTERM
_LAST_WORDS_S = 5.0  # for a traceback, or a log that nobody takes off our hands
_LONGEST_MESSAGE = 300


class Watch:
    """A scope in which the loss of any rank ends this one.

    Args:
        store: The rendezvous store.
        plan: The plan.
        progress: Where this rank is.
        record: The file in which ``progress`` is kept.
        rank: This rank.
        limits: How long to wait for a rank.
        minds_sigterm: Whether SIGTERM is to end the run; False if Megatron is to handle it.
    """

    def __init__(
        self,
        store: dist.Store,
        *,
        plan: Plan,
        progress: Progress,
        record: RecordFile,
        rank: int,
        limits: Limits,
        minds_sigterm: bool,
    ) -> None:
        self._plan = plan
        self._progress = progress
        self._record = record
        self._rank = rank
        self._limits = limits
        self._bulletin = Bulletin(store, rank=rank, world_size=plan.world_size)
        self._termination = Termination() if minds_sigterm else None
        self._main = threading.get_ident()
        self._state: State = "on"
        self._message, self._order = "", 0
        self._changed_s = self._contact_s = time.monotonic()
        self._unreachable = False
        self._lost: Lost | None = None
        self._wake, self._closing, self._closed = (threading.Event() for _ in range(3))
        self._told = threading.Event()
        self._steps = cache(self._steps_of_all)
        self._talker = threading.Thread(target=self._talk, name="mosaic-heartbeat", daemon=True)
        self._watcher = threading.Thread(target=self._watch, name="mosaic-watch", daemon=True)

    def __enter__(self) -> "Watch":
        self._talker.start()
        self._watcher.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        by_intent = (PlanError, LayoutError, HostError, SystemExit, KeyboardInterrupt)
        if error is None or (isinstance(error, SystemExit) and not error.code):
            self._close("ended")
        elif isinstance(error, by_intent):
            self._close("left", error)
        else:
            self._fail(error)

    def _close(self, state: State, error: BaseException | None = None) -> None:
        """Takes leave of the others; none will miss this rank."""
        self._change(state, error)
        self._closing.set()
        self._wake.set()
        self._talker.join(10 * self._limits.interval_s)
        self._closed.set()
        if self._termination is not None:
            self._termination.wake()
        self._watcher.join(10 * self._limits.interval_s)
        if self._termination is not None:
            self._termination.close()
        self._record.remove()

    def _fail(self, error: BaseException) -> None:
        """Waits until the others know; the watching thread ends the rank if another is lost."""
        self._change("cut_off" if error_communicates(error) else "raised", error)
        self._wake.set()
        self._told.wait(2 * self._limits.hurried_s + 10 * self._limits.interval_s)
        self._record.remove()

    def _change(self, state: State, error: BaseException | None = None) -> None:
        if error is not None:
            text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            self._message = " ".join(text.split())[:_LONGEST_MESSAGE]
        self._changed_s = time.monotonic()
        self._state = state

    def _report(self) -> Report:
        now_s, place, state = time.monotonic(), self._progress.place, self._state
        age_s = now_s - place.since_s
        stands = age_s > 2 * self._limits.interval_s  # a rank that runs need not be looked at
        return Report(
            place=place,
            age_s=age_s,
            silent_s=0.0,
            state=state,
            state_s=now_s - self._changed_s,
            order=self._order,
            communicates=stands and frame_communicates(sys._current_frames().get(self._main)),
            message=self._message,
            record=self._record.path,
        )

    def _talk(self) -> None:
        """Tells the others of this rank and hears of them, until the scope or the run ends."""
        interval_s = self._limits.interval_s
        try:
            while self._lost is None:
                closing = self._closing.is_set()
                self._exchange()
                self._contact_s = time.monotonic()
                if closing:
                    self._part()
                    return
                self._wake.wait(interval_s)
                self._wake.clear()
        except (dist.DistError, RuntimeError):
            # Its connection is gone for good, and with it whoever served the store.
            self._unreachable = True

    def _exchange(self) -> None:
        bulletin = self._bulletin
        if self._state in ("raised", "cut_off") and not self._order:
            self._order = bulletin.count("order", more=1)
        report = self._report()
        bulletin.write_report(report)
        if self._rank != 0:
            bulletin.read_board()
            if bulletin.lost is not None:
                bulletin.count("heard", more=1)
                self._lost = bulletin.lost
            return
        reports = {0: report} | bulletin.read_reports()
        lost = find_lost(reports, self._limits, plan=self._plan, steps_of=self._steps)
        bulletin.write_board(report, lost)
        if lost is not None:
            # This rank may serve the store.
            hear = [r for r, other in reports.items() if other.silent_s < self._limits.hurried_s]
            self._await("heard", len(hear) - 1)
            self._lost = lost

    def _part(self) -> None:
        """Keeps the rank that may serve the store alive until all others know that it leaves."""
        if self._rank == 0:
            self._await("gone", self._plan.world_size - 1)
        else:
            self._bulletin.count("gone", more=1)

    def _await(self, name: str, value: int) -> None:
        interval_s = self._limits.interval_s
        self._bulletin.await_count(name, value, interval_s=interval_s, timeout_s=4 * interval_s)

    def _watch(self) -> None:
        """Ends this process when a rank is lost, or a while after it was asked to end."""
        limits = self._limits
        while not self._closed.is_set():
            if self._termination is None:
                self._closed.wait(limits.interval_s)
            elif self._termination.wait(limits.interval_s) and self._state == "on":
                self._change("terminated")
                self._wake.set()
            lost = self._lost or self._lost_judge()
            if self._closed.is_set():
                return
            if lost is not None:
                self._end(lost)
            patience_s = limits.hurried_s + 3 * limits.interval_s
            if self._state == "terminated" and time.monotonic() > self._changed_s + patience_s:
                self._record.remove()
                _say(None)
                os._exit(_EXIT_TERMINATED)

    def _lost_judge(self) -> Lost | None:
        """Finds out, on every rank by itself, whether rank 0 is lost or the store with it."""
        limits, report = self._limits, self._bulletin.last_report(0)
        silent_s = report.silent_s
        if self._rank == 0:
            report = self._report()
            silent_s = time.monotonic() - self._contact_s
        if report.state == "ended":
            return None
        hurry = self._unreachable or self._state in ("cut_off", "terminated")
        limit_s = limits.silence_s(report.place.phase, hurry=hurry)
        if silent_s <= limit_s or (report.state == "terminated" and not self._unreachable):
            return None
        return Lost(
            rank=0,
            why="failed" if report.state == "left" else "silent",
            place=report.place,
            limit_s=limit_s,
            message=report.message,
            record=report.record,
        )

    def _end(self, lost: Lost) -> None:
        """Says which rank is lost, and ends this process."""
        self._record.remove()
        if lost.rank == self._rank and self._state in ("raised", "cut_off"):
            # Its own traceback says more, if only the interpreter comes to its end.
            self._told.set()
            time.sleep(_LAST_WORDS_S)
            os._exit(_EXIT_LOST)
        if lost.why == "silent" and (place := read_record(lost.record)):
            lost = replace(lost, place=place)
        if self._lost is None and not self._unreachable:
            # No judge is left: whoever finds out first tells the others.
            _within(_LAST_WORDS_S, lambda: self._bulletin.write_lost(lost))
        here = describe(self._progress.place, self._rank, self._plan)
        lines = f"error: {lost.line(self._plan)}\nrun: rank={self._rank} was in {here}"
        _say(lines, stacks=lost.rank == self._rank)
        # Others on this machine read the file too, an interval later at most.
        time.sleep(2 * self._limits.interval_s)
        remove_record(lost.record)
        os._exit(_EXIT_LOST)

    def _steps_of_all(
        self, num_microbatches: int, forward_only: bool, part: int
    ) -> list[tuple[Step, ...]]:
        plan = self._plan
        schedule = build_schedule(
            plan, num_microbatches=num_microbatches, forward_only=forward_only
        )
        return [
            steps_of_part(steps_of(plan, schedule, rank), schedule, Part(part))
            for rank in range(plan.world_size)
        ]


def _say(lines: str | None, *, stacks: bool = False) -> None:
    """Prints lines and what is left in the buffers, but does not wait for a stuck terminal."""

    def write() -> None:
        if lines is not None:
            print(lines, file=sys.stderr)
        if stacks:
            faulthandler.dump_traceback(sys.__stderr__ or 2)
        sys.stderr.flush()
        sys.stdout.flush()

    _within(_LAST_WORDS_S, write)


def _within(limit_s: float, act: Callable[[], None]) -> None:
    """Does something, unless it takes too long."""
    thread = threading.Thread(target=act, daemon=True)
    thread.start()
    thread.join(limit_s)
