"""Megatron's interleaved 1F1B of the language model, with modules on ranks of their own beside."""

from collections.abc import Iterator

import numpy as np

from megatron_mosaic.layout.placement import LANGUAGE
from megatron_mosaic.layout.plan import Plan
from megatron_mosaic.schedule.colocated import encoder_stages
from megatron_mosaic.schedule.graph import Stage, needs_backward, stage_distances, stage_order
from megatron_mosaic.schedule.task import Task
from megatron_mosaic.schedule.task_arrays import DueTasks, TaskArrays, in_order

MEGATRON_LEAD = 2
"""Forward tasks by which the warm-up of a place is longer than the next one's.

With two a rank hardly waits for transfers; with one it holds fewer microbatches.
Source: Megatron-LM 0.19, ``get_pp_rank_microbatches``.
"""


def interleaved(plan: Plan, *, num_microbatches: int, forward_only: bool = False) -> TaskArrays:
    """Interleaves the stages that each rank of the language model has.

    Time is cut into slots: in each, every place of the pipeline runs a forward pass and then a
    backward pass, of one microbatch and one of its stages. Forward passes reach the next place in
    the next slot, gradients the place before. Stages of other modules are places too: those of
    encoders before the first, and those that the language model feeds after the last.

    Microbatches that do not fill the pipeline's last round leave slots empty.

    Source:
        Narayanan et al., 2021, arXiv:2104.04473, section 2.2.2. Warm-up tasks are as many as in
        Megatron-LM 0.19, ``get_pp_rank_microbatches``, and two more for each stage behind.
    """
    # Language in four stages on two ranks, .2 and .3 the second ones; vision on rank 2; four
    # microbatches, the first slots. A cell names the language stage after the microbatch.
    #
    # slot    -1   0     1     2     3          4          5          6          7
    # rank 0       F0.0  F1.0  F0.2  F1.2       F2.0 B0.2  F3.0 B1.2  F2.2 B0.0  F3.2 B1.0
    # rank 1             F0.1  F1.1  F0.3 B0.3  F1.3 B1.3  F2.1 B0.1  F3.1 B1.1  F2.3 B2.3
    # rank 2  vF0  vF1               vF2        vF3                              vB0
    return in_order(plan, _due(plan, num_microbatches, MEGATRON_LEAD), forward_only=forward_only)


def max_live(plan: Plan, stage: Stage, *, num_microbatches: int) -> int:
    """Microbatches of which a rank of the stage holds activations at most."""
    if not needs_backward(plan, stage.module):
        return min(num_microbatches, 1)
    passes = _due_of_stage(plan, stage, num_microbatches, MEGATRON_LEAD)
    forward, backward = (own.due for own in passes)
    started = np.arange(1, num_microbatches + 1)
    return int((started - np.searchsorted(backward, forward)).max())


def language_order(
    plan: Plan, *, num_microbatches: int, lead: int = MEGATRON_LEAD
) -> dict[Task, int]:
    """Tasks of the language model and of what it feeds, with numbers that sort them.

    Args:
        plan: The plan.
        num_microbatches: Of the step.
        lead: Forward tasks that each place's warm-up has more than the next one's, 1 or 2.
    """
    encoders = encoder_stages(plan)
    found: dict[Task, int] = {}
    for own in _due(plan, num_microbatches, lead):
        if own.stage not in encoders:
            kind = "B" if own.backward else "F"
            tasks = (Task(kind, *own.stage, (m,)) for m in range(num_microbatches))
            found |= zip(tasks, own.due.tolist(), strict=True)
    return found


def _due(plan: Plan, num_microbatches: int, lead: int) -> Iterator[DueTasks]:
    for stage in stage_order(plan):
        yield from _due_of_stage(plan, stage, num_microbatches, lead)


def _due_of_stage(
    plan: Plan, stage: Stage, num_microbatches: int, lead: int
) -> tuple[DueTasks, DueTasks]:
    """Forward and backward passes of a stage; a slot of a place is two ticks, one for each.

    Every pass is due after all that it takes its input from: with ``place`` the slots begin
    ``lead`` ticks later, so activations have that many ticks to the next place and gradients as
    many back; to the other end, where the next turn begins, both have two ticks or more.
    """
    pp = plan.language.pipeline_model_parallel_size
    last_turn = plan.language.virtual_pipeline_model_parallel_size - 1
    turn, place, last_place = _turn_and_place(plan, stage)
    microbatch = np.arange(num_microbatches)
    one = np.ones_like(microbatch)
    # A round takes `pp` microbatches through all turns of a place, one after the other.
    first = microbatch // pp * pp * (last_turn + 1) + microbatch % pp
    warm_up = lead * (last_place - place) + last_turn * pp
    forward = 2 * (first + turn * pp) + lead * place
    backward = 2 * (first + (last_turn - turn) * pp + warm_up) + lead * place + 1
    return (
        DueTasks(stage, False, microbatch, one, forward),
        DueTasks(stage, True, microbatch, one, backward),
    )


def _turn_and_place(plan: Plan, stage: Stage) -> tuple[int, int, int]:
    """Which of a place's stages it is, its place, and the last place of all.

    Places are counted from the first one of the language model.
    """
    pp = plan.language.pipeline_model_parallel_size
    last_turn = plan.language.virtual_pipeline_model_parallel_size - 1
    distances = stage_distances(plan)
    last_place = pp - 1 + distances[Stage(LANGUAGE, plan.language.num_stages - 1)]
    if stage.module == LANGUAGE:
        turn, place = divmod(stage.stage, pp)
        return turn, place, last_place
    if stage in encoder_stages(plan):
        return 0, distances[Stage(LANGUAGE, 0)] - distances[stage], last_place
    return last_turn, last_place - distances[stage], last_place
