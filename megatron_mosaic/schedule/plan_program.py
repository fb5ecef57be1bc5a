"""The program of a plan's schedule, without building its lists of tasks.

The engine walks a list of tuples for every rank; a planner that weighs many plans of thousands of
tasks has no time to make them.
"""

from megatron_mosaic.layout.plan import Plan
from megatron_mosaic.schedule.build import build_schedule, common_order
from megatron_mosaic.schedule.graph import ahead_modules
from megatron_mosaic.schedule.order import read_lists
from megatron_mosaic.schedule.program import Program, program_of, program_of_lists, wire


def program_of_plan(
    plan: Plan, *, num_microbatches: int | None = None, forward_only: bool = False
) -> Program:
    """Makes the program of the schedule that ``build_schedule`` builds.

    Args:
        plan: The plan.
        num_microbatches: Microbatches of the step; ``None`` takes the plan's.
        forward_only: Leaves the backward tasks out.

    Raises:
        PlanError: There is no microbatch, or the plan holds an order that is not of the form.
    """
    total = plan.num_microbatches if num_microbatches is None else num_microbatches
    order = common_order(plan, num_microbatches=total, forward_only=forward_only)
    if order is not None:
        return wire(plan, order)
    if plan.schedule.order is None:
        return program_of(plan, build_schedule(plan))
    return program_of_lists(plan, read_lists(plan), ahead=ahead_modules(plan), apart=True)
