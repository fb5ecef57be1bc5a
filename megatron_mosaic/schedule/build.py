"""From a plan to its schedule."""

from megatron_mosaic.errors import PlanError
from megatron_mosaic.layout.plan import Plan
from megatron_mosaic.schedule import (
    bubble_fill,
    colocated,
    concurrent,
    interleaved,
    no_pipelining,
    one_f_one_b,
)
from megatron_mosaic.schedule.graph import Stage
from megatron_mosaic.schedule.schedule import Schedule, restrict
from megatron_mosaic.schedule.task_arrays import TaskArrays


def build_schedule(
    plan: Plan, *, num_microbatches: int | None = None, forward_only: bool = False
) -> Schedule:
    """Builds the schedule that a plan asks for.

    Args:
        plan: The plan.
        num_microbatches: Global microbatches of the step; ``None`` takes the plan's. Evaluation
            may have others; the last group of an encoder may then be shorter.
        forward_only: Leaves the backward tasks out.

    Raises:
        PlanError: There is no microbatch, or the plan holds an order that is not of the form.
    """
    if num_microbatches is None:
        num_microbatches = plan.num_microbatches
    order = common_order(plan, num_microbatches=num_microbatches, forward_only=forward_only)
    if order is None:
        listed = plan.schedule.kind == "concurrent"
        return concurrent.concurrent(plan) if listed else bubble_fill.bubble_fill(plan)
    return restrict(order, plan=plan, num_microbatches=num_microbatches, forward_only=forward_only)


def common_order(
    plan: Plan, *, num_microbatches: int, forward_only: bool = False
) -> TaskArrays | None:
    """Tasks of all stages in the one order that all ranks keep, each with its own.

    Evaluation, and steps with other microbatches than the plan's, keep to ``colocated`` where the
    plan asks for ``bubble_fill`` or ``concurrent``.

    Returns:
        Tasks whose ``stage`` counts the plan's ``stage_order``; None under these two, where every
        kind of ranks has an order of its own.

    Raises:
        PlanError: There is no microbatch.
    """
    if num_microbatches < 1:
        raise PlanError(
            f"schedule: num_microbatches={num_microbatches} must be >= 1; "
            f"give the step at least one microbatch"
        )
    match plan.schedule.kind:
        case "no_pipelining":
            build = no_pipelining.no_pipelining
        case "1f1b":
            build = one_f_one_b.one_f_one_b
        case "interleaved":
            build = interleaved.interleaved
        case "colocated":
            build = colocated.colocated
        case "bubble_fill" | "concurrent":
            if not forward_only and num_microbatches == plan.num_microbatches:
                return None
            build = colocated.colocated
    return build(plan, num_microbatches=num_microbatches, forward_only=forward_only)


def max_live(plan: Plan, stage: Stage, *, num_microbatches: int) -> int:
    """Tasks of a stage whose activations one rank holds at most under the plan's schedule."""
    match plan.schedule.kind:
        case "no_pipelining":
            return min(num_microbatches, 1)
        case "1f1b":
            return one_f_one_b.max_live(plan, stage, num_microbatches=num_microbatches)
        case "interleaved":
            return interleaved.max_live(plan, stage, num_microbatches=num_microbatches)
        case "colocated":
            return colocated.max_live(plan, stage, num_microbatches=num_microbatches)
        case "bubble_fill":
            return bubble_fill.max_live(plan, stage, num_microbatches=num_microbatches)
        case "concurrent":
            return concurrent.max_live(plan, stage, num_microbatches=num_microbatches)
