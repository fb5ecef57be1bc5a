"""One microbatch at a time through the whole module graph."""

from collections.abc import Iterator

import numpy as np

from megatron_mosaic.layout.plan import Plan
from megatron_mosaic.schedule.graph import stage_order
from megatron_mosaic.schedule.task_arrays import DueTasks, TaskArrays, in_order


def no_pipelining(plan: Plan, *, num_microbatches: int, forward_only: bool = False) -> TaskArrays:
    """Runs every microbatch forward through all modules, then backward.

    The least memory and the most waiting: one microbatch is live on every rank. Ranks of the
    modules may be equal, disjoint or overlapping.
    """
    # Vision on ranks 0-1, language on rank 0; two microbatches.
    #
    # rank 0   vF0 F0 B0 vB0 vF1 F1 B1 vB1
    # rank 1   vF0 vB0 vF1 vB1
    return in_order(plan, _due(plan, num_microbatches), forward_only=forward_only)


def _due(plan: Plan, num_microbatches: int) -> Iterator[DueTasks]:
    stages = stage_order(plan)
    microbatch = np.arange(num_microbatches)
    one = np.ones_like(microbatch)
    for position, stage in enumerate(stages):
        start = 2 * len(stages) * microbatch
        yield DueTasks(stage, False, microbatch, one, start + position)
        yield DueTasks(stage, True, microbatch, one, start + 2 * len(stages) - 1 - position)
