"""What a rank must have done, from the plan alone and by other code than the ranks run."""

from collections.abc import Sequence

import numpy as np

from megatron_mosaic.layout.placement import ModulePlacement
from megatron_mosaic.layout.plan import Plan
from megatron_mosaic.schedule.ahead import Part, steps_of_part
from megatron_mosaic.schedule.build import build_schedule
from megatron_mosaic.schedule.steps import Step, steps_of

# Axes of the grids slowest first, so that a list of ranks fills an array of them in order.
GRID = ("pp", "dp", "cp", "tp")
EXPERT_GRID = ("pp", "expt_dp", "ep", "expt_tp")


def expected_groups(placement: ModulePlacement, rank: int) -> dict[str, tuple[int, ...]]:
    """Members of the groups that a rank has for each axis of a module's grids, in order."""
    tp, cp, dp, pp = placement.shape
    expt_tp, ep, expt_dp, _ = placement.expert_shape
    return _along(placement.ranks, GRID, (pp, dp, cp, tp), rank) | {
        axis: members
        for axis, members in _along(
            placement.ranks, EXPERT_GRID, (pp, expt_dp, ep, expt_tp), rank
        ).items()
        if axis != "pp"
    }


def _along(
    ranks: Sequence[int], axes: Sequence[str], sizes: Sequence[int], rank: int
) -> dict[str, tuple[int, ...]]:
    grid = np.array(ranks).reshape(sizes)
    place = tuple(int(index[0]) for index in np.nonzero(grid == rank))
    groups = {}
    for number, axis in enumerate(axes):
        line = (*place[:number], slice(None), *place[number + 1 :])
        groups[axis] = tuple(int(member) for member in grid[line])
    return groups


def expected_walk(
    plan: Plan, rank: int, *, forward_only: bool, is_first: bool, is_last: bool
) -> tuple[Step, ...]:
    """Steps of the schedule that a rank must go through, in order.

    Args:
        plan: The plan.
        rank: The rank.
        forward_only: Whether they are of evaluation.
        is_first: Whether no training step comes before.
        is_last: Whether no training step comes after.
    """
    schedule = build_schedule(plan, forward_only=forward_only)
    steps = steps_of(plan, schedule, rank)
    if not schedule.ahead:
        return tuple(steps)
    begins = Part.BEGINS if is_first or forward_only else Part(0)
    return steps_of_part(steps, schedule, begins | (Part.ENDS if is_last else Part(0)))
