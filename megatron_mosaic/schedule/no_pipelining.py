"""One microbatch at a time through the whole module graph."""

from collections.abc import Iterator

from megatron_mosaic.layout.plan import Plan
from megatron_mosaic.schedule.graph import Stage, stage_order
from megatron_mosaic.schedule.schedule import Schedule, restrict
from megatron_mosaic.schedule.task import Task


def no_pipelining(plan: Plan, *, num_microbatches: int, forward_only: bool = False) -> Schedule:
    """Runs every microbatch forward through all modules, then backward.

    The least memory and the most waiting: one microbatch is live on every rank. Ranks of the
    modules may be equal, disjoint or overlapping.
    """
    # Vision on ranks 0-1, language on rank 0; two microbatches.
    #
    # rank 0   vF0 F0 B0 vB0 vF1 F1 B1 vB1
    # rank 1   vF0 vB0 vF1 vB1
    return restrict(
        _order(stage_order(plan), num_microbatches),
        plan=plan,
        num_microbatches=num_microbatches,
        forward_only=forward_only,
    )


def _order(stages: tuple[Stage, ...], num_microbatches: int) -> Iterator[Task]:
    for microbatch in range(num_microbatches):
        yield from (Task("F", *stage, (microbatch,)) for stage in stages)
        yield from (Task("B", *stage, (microbatch,)) for stage in reversed(stages))
