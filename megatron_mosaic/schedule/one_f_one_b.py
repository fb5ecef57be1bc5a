"""The 1F1B pipeline schedule over the stages of all modules."""

from megatron_mosaic.layout.plan import Plan
from megatron_mosaic.schedule.clock import Clock, pipeline_due
from megatron_mosaic.schedule.graph import Stage, stage_distances
from megatron_mosaic.schedule.task_arrays import TaskArrays, in_order


def one_f_one_b(plan: Plan, *, num_microbatches: int, forward_only: bool = False) -> TaskArrays:
    """Treats every stage of every module as a stage of one pipeline shaped like the graph.

    A stage warms up with as many microbatches as there are stages behind it on the longest
    path, so parallel encoders of different depth are ready together.

    Source:
        Narayanan et al., 2021, arXiv:2104.04473, section 2.2.1 (PipeDream-flush), with the
        number of warm-up microbatches taken along the longest path.
    """
    # Vision with two stages, audio with one, language with two, each on a rank of its own; four
    # microbatches. Warm-up before the first |, cool-down after the second.
    #
    # rank 0  vision.0    vF0 vF1 vF2 | vF3 vB0 | vB1 vB2 vB3
    # rank 1  vision.1    vF0 vF1 | vF2 vB0 vF3 vB1 | vB2 vB3
    # rank 2  audio.0     aF0 aF1 | aF2 aB0 aF3 aB1 | aB2 aB3
    # rank 3  language.0  F0 | F1 B0 F2 B1 F3 B2 | B3
    # rank 4  language.1  | F0 B0 F1 B1 F2 B2 F3 B3 |
    distances = stage_distances(plan)
    clock = Clock(depth=max(distances.values()), backward=not forward_only)
    due = pipeline_due(clock, distances, num_microbatches=num_microbatches)
    return in_order(plan, due, forward_only=forward_only)


def max_live(plan: Plan, stage: Stage, *, num_microbatches: int) -> int:
    """Microbatches of which a rank of the stage holds activations at most."""
    return min(num_microbatches, stage_distances(plan)[stage] + 1)
