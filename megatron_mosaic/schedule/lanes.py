"""Lanes of a rank: which steps may run at the same time there, and which must wait for others.

A rank launches its steps one after the other, in the order of its schedule. A lane runs what was
launched in it in that order, beside other lanes; an event makes a step wait for one of another.
"""

from collections.abc import Sequence
from typing import NamedTuple

from megatron_mosaic.layout.plan import Plan
from megatron_mosaic.schedule.graph import hosted_stages
from megatron_mosaic.schedule.steps import Compute, Post, Step, Transfer, Wait

ONE_LANE = ""
"""Name of the lane of ranks that run one module at a time."""


class LaneStep(NamedTuple):
    """A step in its lane.

    Args:
        step: The step.
        lane: Its lane.
        after: Positions of earlier steps, in other lanes, whose events it waits for.
    """

    step: Step
    lane: str
    after: tuple[int, ...] = ()


def has_lanes(plan: Plan) -> bool:
    """Whether modules on the same rank run at the same time."""
    return plan.schedule.kind == "concurrent"


def lane_of(plan: Plan, module: str) -> str:
    """Lane of a module's tasks: its own where modules run at the same time."""
    return module if has_lanes(plan) else ONE_LANE


def lanes_of(plan: Plan, rank: int) -> tuple[str, ...]:
    """Lanes of a rank, in plan order."""
    return tuple(dict.fromkeys(lane_of(plan, stage.module) for stage in hosted_stages(plan, rank)))


def lane_steps(plan: Plan, steps: Sequence[Step], rank: int) -> tuple[LaneStep, ...]:
    """Puts a rank's steps into lanes, with the fewest events that keep them right.

    Only a transfer whose two ends are on the rank joins lanes: what its source posts its
    destination waits for. An event that others imply is left out, so that each counts.
    """
    hosted = {stage.module for stage in hosted_stages(plan, rank)}
    found: list[LaneStep] = []
    posted: dict[Transfer, int] = {}
    # For every step the last step of each lane that is sure to have ended when it runs.
    ended: list[dict[str, int]] = []
    last: dict[str, int] = {}
    for position, step in enumerate(steps):
        lane = lane_of(plan, _module(step, hosted))
        known = dict(ended[last[lane]]) if lane in last else {}
        after = []
        before = posted.get(step.transfer) if isinstance(step, Wait) else None
        if before is not None and known.get(found[before].lane, -1) < before:
            after.append(before)
            for other, until in ended[before].items():
                known[other] = max(known.get(other, -1), until)
        known[lane] = position
        if isinstance(step, Post):
            posted[step.transfer] = position
        last[lane] = position
        ended.append(known)
        found.append(LaneStep(step, lane, tuple(after)))
    return tuple(found)


def _module(step: Step, hosted: set[str]) -> str:
    """Module in whose lane a step runs: transfers in that of their source where it is here."""
    if isinstance(step, Compute):
        return step.task.module
    kind, edge, _ = step.transfer
    ends = edge.source, edge.destination
    source, destination = ends if kind == "activation" else ends[::-1]
    return destination if isinstance(step, Wait) or source not in hosted else source
