"""Lanes of a rank: which steps may run at the same time there, and which must wait for others.

A rank launches its steps one after the other, in the order of its schedule. A lane runs what was
launched in it in that order, beside other lanes; an event makes a step wait for one of another.
"""

from collections.abc import Collection, Sequence
from typing import NamedTuple

from megatron_mosaic.layout.plan import Plan
from megatron_mosaic.schedule.graph import Stage, ahead_modules, hosted_stages
from megatron_mosaic.schedule.steps import Compute, Post, Step, Transfer, Wait, crosses_steps
from megatron_mosaic.schedule.task import Task

ONE_LANE = ""
"""Name of the lane of ranks that run one module at a time."""

MAIN = "<main>"
"""Name of the lane of the training loop, which has the rank's memory between steps."""


class LaneStep(NamedTuple):
    """A step in its lane.

    Args:
        step: The step.
        lane: Its lane.
        after: Positions of earlier steps, in other lanes, whose events it waits for.
        whole: Whether it runs on the whole GPU, as no step of another lane can run beside it.
    """

    step: Step
    lane: str
    after: tuple[int, ...] = ()
    whole: bool = False


class Joins(NamedTuple):
    """Events between a rank's lanes and the training loop; other waits imply the rest.

    Args:
        begin: Lanes that wait for the training loop before their first step.
        end: Lanes for whose last steps the training loop waits.
    """

    begin: tuple[str, ...]
    end: tuple[str, ...]


def has_lanes(plan: Plan) -> bool:
    """Whether modules on the same rank run at the same time."""
    return plan.schedule.kind == "concurrent"


def lane_of(plan: Plan, module: str) -> str:
    """Lane of a module's tasks: its own where modules run at the same time."""
    return module if has_lanes(plan) else ONE_LANE


def lanes_of(plan: Plan, rank: int) -> tuple[str, ...]:
    """Lanes of a rank, in plan order."""
    return tuple(dict.fromkeys(lane_of(plan, stage.module) for stage in hosted_stages(plan, rank)))


def lane_steps(
    plan: Plan,
    steps: Sequence[Step],
    rank: int,
    *,
    alone: Collection[Task] = (),
    ahead: frozenset[str] = frozenset(),
) -> tuple[LaneStep, ...]:
    """Puts a rank's steps into lanes, with the fewest events that keep them right.

    Only a transfer whose two ends are on the rank joins lanes: one posts what another one made, or
    waits for what it posted. An event that others imply is left out, so that each counts.

    Args:
        plan: The plan.
        steps: What the rank does, in the order in which it launches it.
        rank: The rank.
        alone: Its tasks beside which no other lane can run, as ``alone_tasks`` finds them.
        ahead: Modules that run a step ahead. What they made before the steps begin is at hand:
            whoever uses it does not wait for their lanes.
    """
    hosted = hosted_stages(plan, rank)
    lanes = [lane_of(plan, _lane_module(plan, step, hosted)) for step in steps]
    made: dict[tuple[Stage, int], int] = {}
    posted: dict[Transfer, int] = {}
    after: list[tuple[int, ...]] = []
    order = _Order()
    for position, (step, lane) in enumerate(zip(steps, lanes, strict=True)):
        before = None
        match step:
            case Compute(task):
                made |= dict.fromkeys(((Stage(*task[1:3]), m) for m in task.microbatches), position)
            case Post(transfer):
                posted[transfer] = position
                if not crosses_steps(ahead, transfer.edge):
                    before = made.get((_ends(transfer)[0], transfer.microbatch))
            case Wait(transfer):
                before = posted.get(transfer)
        after.append(() if before is None or order.implies(before, lane) else (before,))
        order.add(lane, after[-1])
    return tuple(map(LaneStep, steps, lanes, after, _whole(steps, lanes, hosted, alone)))


def joins(steps: Sequence[LaneStep]) -> Joins:
    """Finds the fewest events that join a rank's lanes to the training loop around them."""
    first: dict[str, LaneStep] = {}
    order = _Order()
    for step in steps:
        first.setdefault(step.lane, step)
        order.add(step.lane, step.after)
    # A lane that has waited for the last step of another one covers it.
    end = tuple(
        lane
        for lane, position in order.last.items()
        if not any(order.implies(position, other) for other in order.last if other != lane)
    )
    return Joins(tuple(lane for lane, step in first.items() if not step.after), end)


class _Order:
    """Which steps have ended for sure where a step of a lane runs."""

    def __init__(self) -> None:
        self.last: dict[str, int] = {}
        self._lanes: list[str] = []
        # For every step the last one of each lane that has ended when it has.
        self._ended: list[dict[str, int]] = []

    def implies(self, position: int, lane: str) -> bool:
        """Whether a step has ended before the next one of a lane in any case."""
        ended = self._ended[self.last[lane]] if lane in self.last else {}
        return ended.get(self._lanes[position], -1) >= position

    def add(self, lane: str, after: Sequence[int]) -> None:
        """Adds the next step, which waits for some before it."""
        ended = dict(self._ended[self.last[lane]]) if lane in self.last else {}
        for before in after:
            for other, until in self._ended[before].items():
                ended[other] = max(ended.get(other, -1), until)
        self.last[lane] = ended[lane] = len(self._lanes)
        self._lanes.append(lane)
        self._ended.append(ended)


def _whole(
    steps: Sequence[Step], lanes: Sequence[str], hosted: Collection[Stage], alone: Collection[Task]
) -> list[bool]:
    """Which steps run on the whole GPU: tasks that are alone, and the transfers that are theirs.

    What leaves a stage belongs to the task before it in its lane, what arrives to the one behind.
    """
    whole = [isinstance(step, Compute) and step.task in alone for step in steps]
    forwards = range(len(steps))
    for leaving, positions in (True, forwards), (False, reversed(forwards)):
        at_task: dict[str, bool] = {}
        for position in positions:
            step, lane = steps[position], lanes[position]
            if isinstance(step, Compute):
                at_task[lane] = whole[position]
                continue
            source = _ends(step.transfer)[0]
            leaves = (
                isinstance(step, Post) and source in hosted and lane in (source.module, ONE_LANE)
            )
            if leaving == leaves:
                whole[position] = at_task.get(lane, False)
    return whole


def _lane_module(plan: Plan, step: Step, hosted: Collection[Stage]) -> str:
    """Module in whose lane a step runs: that of the stage that made what is posted, if it is here.

    What a step of training finds at hand is posted by the stage that uses it, if that is here;
    and so in evaluation, as an edge keeps to one lane of a rank.
    """
    if isinstance(step, Compute):
        return step.task.module
    source, destination = _ends(step.transfer)
    if isinstance(step, Wait) or source not in hosted:
        return destination.module
    is_kept = crosses_steps(ahead_modules(plan), step.transfer.edge)
    return destination.module if is_kept and destination in hosted else source.module


def _ends(transfer: Transfer) -> tuple[Stage, Stage]:
    """Stage that sends, and the one that receives."""
    here, there = transfer.edge.ends
    return (here, there) if transfer.kind == "activation" else (there, here)
