"""Encoder tasks in the waits of the language model's pipeline."""

from megatron_mosaic.layout.plan import Plan
from megatron_mosaic.schedule import colocated, interleaved
from megatron_mosaic.schedule.fill import fill, live_bound
from megatron_mosaic.schedule.graph import Stage, stage_order
from megatron_mosaic.schedule.order import read_order
from megatron_mosaic.schedule.schedule import Schedule
from megatron_mosaic.schedule.simulate import PassTimes


def bubble_fill(plan: Plan) -> Schedule:
    """Gives a step of training the order that the plan holds.

    A plan without one gets the order for forward passes of one unit and backward passes of two.

    Raises:
        PlanError: The order is not of the form, or the bound on live encoder tasks is too low.
    """
    # Vision on ranks 0-1, a replica on each; language in two stages on them. Forward passes take
    # one unit, backward passes two, of vision one.
    #
    # rank 0  vF0 F0  vF1 F1 vF2 B0 B0 vF3 vB0 F2 B1 B1 F3 B2 B2 vB1 B3 B3 vB2 vB3
    # rank 1  vF0 vF1 F0  B0 B0  F1 B1 B1  vF2 vF3 F2 B2 B2 F3 B3 B3 vB0 vB1 vB2 vB3
    if plan.schedule.order is not None:
        return read_order(plan)
    return fill(plan, tasks_s={stage: PassTimes(1.0, 2.0) for stage in stage_order(plan)})


def max_live(plan: Plan, stage: Stage, *, num_microbatches: int) -> int:
    """Tasks of which a rank of the stage holds activations at most."""
    if num_microbatches != plan.num_microbatches:
        return colocated.max_live(plan, stage, num_microbatches=num_microbatches)
    if stage in colocated.encoder_stages(plan):
        return live_bound(plan, stage)
    virtual = plan.language.virtual_pipeline_model_parallel_size
    pipeline = colocated if virtual == 1 else interleaved
    return pipeline.max_live(plan, stage, num_microbatches=num_microbatches)
