"""Encoder tasks in the waits of the language model's pipeline."""

from dataclasses import replace

from megatron_mosaic.layout.plan import Plan
from megatron_mosaic.schedule.colocated import colocated
from megatron_mosaic.schedule.graph import ahead_modules
from megatron_mosaic.schedule.schedule import Schedule


def bubble_fill(plan: Plan, *, num_microbatches: int, forward_only: bool = False) -> Schedule:
    """Puts encoder tasks where the language model waits."""
    schedule = colocated(plan, num_microbatches=num_microbatches, forward_only=forward_only)
    if forward_only:
        return schedule
    return replace(schedule, ahead=ahead_modules(plan), receives_early=True)
