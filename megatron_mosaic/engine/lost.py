"""Which rank is lost: decided from what all ranks said of themselves, without a device."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from megatron_mosaic.engine.progress import UNKNOWN_S, Phase, Place
from megatron_mosaic.layout.plan import Plan
from megatron_mosaic.schedule.ahead import (
    Part,
    prologue_of,
    runs_ahead,
    steps_after_prologue,
)
from megatron_mosaic.schedule.build import build_schedule
from megatron_mosaic.schedule.rendezvous import needed_ranks
from megatron_mosaic.schedule.steps import Compute, Step, Wait
from megatron_mosaic.schedule.steps import steps_of as steps_of_rank

# on: runs. ended: all is well. left: stopped because of the user's input. raised: failed by itself.
# cut_off: a communication failed, perhaps for another rank's sake. terminated: was told to end.
State = Literal["on", "ended", "left", "raised", "cut_off", "terminated"]
StepsOf = Callable[[int, bool, int], Sequence[Sequence[Step]]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """How long to wait for a rank, in seconds.

    Args:
        task_s: A task beyond the longest of the step before; None leaves the first step to
            ``start_s`` and takes ``default_task_s`` later.
        default_task_s: See ``task_s``.
        heartbeat_s: For a rank's next heartbeat.
        start_s: For a rank that starts, and for tasks that may still be compiled.
        interval_s: Between two heartbeats.
    """

    task_s: float | None
    default_task_s: float
    heartbeat_s: float
    start_s: float
    interval_s: float

    @property
    def hurried_s(self) -> float:
        """For a heartbeat when a communication has failed or the ranks are being ended."""
        return min(5 * self.interval_s, self.heartbeat_s)

    def silence_s(self, phase: int, *, hurry: bool) -> float:
        """Longest time without a heartbeat of a rank in this phase."""
        if hurry:
            return self.hurried_s
        return self.start_s if phase == Phase.START else self.heartbeat_s

    def stay_s(self, place: Place) -> float:
        """Longest time at one place of a step."""
        if place.longest_s != UNKNOWN_S:
            return place.longest_s + (self.task_s or self.default_task_s)
        return self.task_s or self.start_s


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """What a rank last said of itself.

    Args:
        place: Where it was.
        age_s: How long it had been there.
        silent_s: How long ago it said so.
        state: How it fares.
        state_s: How long it had been in that state.
        order: Which rank's state changed first.
        communicates: Whether its main thread was inside a communication call.
        message: Its error, one line.
        record: File on its machine that says where it is now.
    """

    place: Place
    age_s: float
    silent_s: float
    state: State
    state_s: float = 0.0
    order: int = 0
    communicates: bool = False
    message: str = ""
    record: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Lost:
    """A rank that the others cannot go on without.

    Args:
        rank: The rank.
        why: What it did: fell silent, stayed in one place, or failed with an error.
        place: Where.
        limit_s: Seconds that it had, where ``why`` is a matter of time.
        message: Its error.
        others: Ranks that are lost with it.
        record: File on its machine that says where it is, more exactly than its last report.
    """

    rank: int
    why: Literal["silent", "stuck", "failed", "cut_off"]
    place: Place
    limit_s: float = 0.0
    message: str = ""
    others: tuple[int, ...] = ()
    record: str = ""

    def line(self, plan: Plan) -> str:
        """Says in one line which rank is lost, in which task, and what to do."""
        where = describe(self.place, self.rank, plan)
        others = f" with ranks {list(self.others)}" if self.others else ""
        who = f"run: rank={self.rank}{others} must"
        look = "look at its output and its machine"
        match self.why:
            case "silent":
                return f"{who} answer within {self.limit_s:g} s, it was last in {where}; {look}"
            case "stuck":
                return (
                    f"{who} leave {where} within {self.limit_s:.3g} s; {look}, or raise "
                    f"--mosaic-task-timeout-s if it was at work"
                )
            case "failed":
                return f"{who} end {where} without an error, it had {self.message}; {look}"
            case "cut_off":
                return f"{who} reach its peers in {where}, it had {self.message}; {look}"


def find_lost(
    reports: Mapping[int, Report], limits: Limits, *, plan: Plan, steps_of: StepsOf
) -> Lost | None:
    """Finds the rank that the others wait for, if they wait in vain.

    An error of a rank's own comes first; then a rank that fell silent; then one that left alone;
    then a failed communication that no lost rank explains; then a rank that stands still.

    Args:
        reports: Last report of every rank.
        limits: How long to wait.
        plan: The plan.
        steps_of: Steps of every rank, by number of microbatches, whether there is no backward,
            and the part that the step walks.
    """
    live = {rank: report for rank, report in reports.items() if report.state != "ended"}
    hurry = any(report.state in ("cut_off", "terminated") for report in live.values())
    raised = _first(live, "raised")
    if raised is not None:
        return _failed(raised, live[raised])
    silent = [
        rank
        for rank, report in live.items()
        if report.state != "terminated"
        and report.silent_s > limits.silence_s(report.place.phase, hurry=hurry)
    ]
    gone = [rank for rank in silent if live[rank].state != "left"]
    if gone:
        return _silent(gone, live, limits, hurry=hurry)
    if silent:
        return _failed(silent[0], live[silent[0]])
    cut_off = _first(live, "cut_off")
    if cut_off is not None:
        # Whoever died has been silent for longer by then.
        if live[cut_off].state_s <= limits.hurried_s + 3 * limits.interval_s:
            return None
        return _failed(cut_off, live[cut_off], why="cut_off")
    return None if hurry else _find_stuck(live, limits, plan=plan, steps_of=steps_of)


def _first(reports: Mapping[int, Report], state: State) -> int | None:
    ranks = [rank for rank, report in reports.items() if report.state == state]
    return min(ranks, key=lambda rank: reports[rank].order, default=None)


def _silent(
    gone: Sequence[int], live: Mapping[int, Report], limits: Limits, *, hurry: bool
) -> Lost:
    """Blames the rank that fell silent first: others may have died of it."""
    rank, *others = sorted(gone, key=lambda rank: -live[rank].silent_s)
    place = live[rank].place
    return Lost(
        rank=rank,
        why="silent",
        place=place,
        limit_s=limits.silence_s(place.phase, hurry=hurry),
        others=tuple(others),
        record=live[rank].record,
    )


def _failed(rank: int, report: Report, *, why: Literal["failed", "cut_off"] = "failed") -> Lost:
    return Lost(rank=rank, why=why, place=report.place, message=report.message)


def _find_stuck(
    live: Mapping[int, Report], limits: Limits, *, plan: Plan, steps_of: StepsOf
) -> Lost | None:
    """Finds the rank that stays too long in its task and waits for no other.

    Ranks that wait for it stand still as well, in a transfer, in a collective of the same task
    or after the tasks. So a rank counts only if it needs no other rank to go on; and as long as
    such a rank is at work, outside any communication call, those in one are not to blame.
    """
    inside = {r: live[r] for r in live if live[r].place.phase in (Phase.WALKING, Phase.CLOSING)}
    overdue = {r: inside[r].age_s - limits.stay_s(inside[r].place) for r in inside}
    if not inside or max(overdue.values()) <= 0:
        return None
    place = next(iter(inside.values())).place
    if any(report.place.count != place.count for report in live.values()):
        return None  # the reports are of different moments: steps begin together
    steps = steps_of(place.num_microbatches, bool(place.forward_only), place.part)
    positions = [
        inside[rank].place.position if rank in inside else len(own)
        for rank, own in enumerate(steps)
    ]
    needed = needed_ranks(plan, steps, positions)
    roots = [rank for rank in inside if not needed[rank]]
    working = [
        rank
        for rank in roots
        if not live[rank].communicates and not _waits(steps[rank], positions[rank])
    ]
    if not working and min(overdue.values()) <= 0:
        return None
    rank = max(working or roots or inside, key=lambda rank: overdue[rank])
    if overdue[rank] <= 0:
        return None
    report = live[rank]
    return Lost(rank=rank, why="stuck", place=report.place, limit_s=limits.stay_s(report.place))


def _waits(steps: Sequence[Step], position: int) -> bool:
    return position < len(steps) and isinstance(steps[position], Wait)


def describe(place: Place, rank: int, plan: Plan) -> str:
    """Says where a rank is: module, stage, microbatches and step of a task where it is in one."""
    step = f"step {place.iteration}"
    if place.forward_only:
        step = f"the evaluation after {step}"
    match place.phase:
        case Phase.START:
            return "the start-up"
        case Phase.CLOSING:
            return f"the losses and gradients of {step}"
        case Phase.BETWEEN:
            return f"what follows {step}"
    schedule = build_schedule(
        plan,
        num_microbatches=place.num_microbatches,
        forward_only=bool(place.forward_only),
    )
    every = steps_of_rank(plan, schedule, rank)
    prologue = prologue_of(every, schedule, Part(place.part))
    steps = prologue + steps_after_prologue(every, schedule, Part(place.part))
    if not steps:
        return step
    position = min(place.position, len(steps) - 1)
    here = steps[position]
    if runs_ahead(schedule, here) and position >= len(prologue):
        step = f"step {place.iteration + 1}, ahead in {step}"
    if isinstance(here, Compute):
        return f"{here.task} of {step}"
    # Of a task are the transfers that it waits for, and those that carry what it made.
    coming = [each.task for each in steps[position:] if isinstance(each, Compute)]
    done = [each.task for each in steps[:position] if isinstance(each, Compute)]
    return f"{here.transfer}, at {(coming or done[-1:])[0]} of {step}"
