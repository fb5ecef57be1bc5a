"""Modules that run at the same time on the ranks they share, each in a lane of its own."""

from megatron_mosaic.layout.plan import Plan
from megatron_mosaic.schedule.bubble_fill import max_live as max_live  # the same bounds hold
from megatron_mosaic.schedule.fill import fill
from megatron_mosaic.schedule.graph import stage_order
from megatron_mosaic.schedule.order import read_order
from megatron_mosaic.schedule.schedule import Schedule
from megatron_mosaic.schedule.simulate import PassTimes


def concurrent(plan: Plan) -> Schedule:
    """Gives a step of training the order that the plan holds: the one in which tasks are launched.

    A plan without one gets the order for forward passes of one unit and backward passes of two,
    with every lane as fast as if it were alone.

    Raises:
        PlanError: The order is not of the form, or the bound on live encoder tasks is too low.
    """
    if plan.schedule.order is not None:
        return read_order(plan)
    return fill(plan, tasks_s={stage: PassTimes(1.0, 2.0) for stage in stage_order(plan)})
