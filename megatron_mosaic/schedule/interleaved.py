"""Megatron's interleaved 1F1B of the language model, with modules on ranks of their own beside."""

from megatron_mosaic.layout.placement import LANGUAGE
from megatron_mosaic.layout.plan import Plan
from megatron_mosaic.schedule.colocated import encoder_stages
from megatron_mosaic.schedule.graph import Stage, stage_distances, stage_order
from megatron_mosaic.schedule.one_f_one_b import one_f_one_b
from megatron_mosaic.schedule.play import needs_of, play
from megatron_mosaic.schedule.schedule import Schedule, peak_live, restrict
from megatron_mosaic.schedule.task import Task

MEGATRON_LEAD = 2
"""Forward tasks by which the warm-up of a place is longer than the next one's.

With two a rank hardly waits for transfers; with one it holds fewer microbatches.
Source: Megatron-LM 0.19, ``get_pp_rank_microbatches``.
"""

_TICKS = {"F": 1, "B": 2}


def interleaved(plan: Plan, *, num_microbatches: int, forward_only: bool = False) -> Schedule:
    """Interleaves the stages that each rank of the language model has.

    Encoders run a microbatch when the first language stage is about to need it, each stage one
    tick earlier than what it feeds, and its backward pass when the gradient comes.

    Microbatches that do not fill the pipeline's last round, in evaluation, go through all stages
    as through a plain pipeline.
    """
    # Language in four stages on two ranks, .2 and .3 the second ones; vision on rank 2; four
    # microbatches. A cell names the language stage after the microbatch.
    #
    # rank 0  F0.0 F1.0 F0.2 F1.2 F2.0 B0.2 F3.0 B1.2 F2.2 B0.0 F3.2 B1.0 B2.2 B3.2 B2.0 B3.0
    # rank 1  F0.1 F1.1 F0.3 B0.3 F1.3 B1.3 F2.1 B0.1 F3.1 B1.1 F2.3 B2.3 F3.3 B3.3 B2.1 B3.1
    # rank 2  vF0 vF1 vF2 vF3 vB0 vB1 vB2 vB3
    if num_microbatches % plan.language.pipeline_model_parallel_size and not forward_only:
        return one_f_one_b(plan, num_microbatches=num_microbatches)
    times = language_order(plan, num_microbatches=num_microbatches, forward_only=forward_only)
    due = [(start, start + end, task) for task, (start, end) in times.items()]
    for stage, early in _ticks_before_language(plan).items():
        for m in range(num_microbatches):
            start, _ = times[Task("F", LANGUAGE, 0, (m,))]
            due.append((start - early, 0.0, Task("F", *stage, (m,))))
            if not forward_only:
                _, end = times[Task("B", LANGUAGE, 0, (m,))]
                due.append((end + 2 * (early - 1), 0.0, Task("B", *stage, (m,))))
    return restrict(
        (task for *_, task in sorted(due, key=lambda item: item[:2])),
        plan=plan,
        num_microbatches=num_microbatches,
        forward_only=forward_only,
    )


def language_order(
    plan: Plan,
    *,
    num_microbatches: int,
    forward_only: bool = False,
    lead: int = MEGATRON_LEAD,
) -> dict[Task, tuple[float, float]]:
    """Starts and ends, in ticks, of the tasks of the language model and of what it feeds.

    Args:
        plan: The plan.
        num_microbatches: Of the step.
        forward_only: Leaves the backward tasks out.
        lead: Forward tasks that each place's warm-up has more than the next one's, at least 1.
    """
    lists = _language_lists(
        plan, num_microbatches=num_microbatches, forward_only=forward_only, lead=lead
    )
    return play(lists, needs_of(plan), lengths=lambda task: _TICKS[task.kind])


def _language_lists(
    plan: Plan, *, num_microbatches: int, forward_only: bool, lead: int
) -> list[list[Task]]:
    """Tasks of each pipeline place of the language model, and of each stage behind it."""
    pp = plan.language.pipeline_model_parallel_size
    distances = stage_distances(plan)
    last = distances[Stage(LANGUAGE, plan.language.num_stages - 1)]
    lists = [
        _place_tasks(
            plan,
            place,
            num_microbatches=num_microbatches,
            num_ahead=lead * (pp - 1 - place + last),
            forward_only=forward_only,
        )
        for place in range(pp)
    ]
    encoders = encoder_stages(plan)
    for stage in stage_order(plan):
        if stage.module != LANGUAGE and stage not in encoders:
            forward = [Task("F", *stage, (m,)) for m in range(num_microbatches)]
            backward = [Task("B", *stage, (m,)) for m in range(num_microbatches)]
            tasks = _alternate(forward, backward, warm_up=distances[stage])
            lists.append(forward if forward_only else tasks)
    return lists


def max_live(plan: Plan, stage: Stage, *, num_microbatches: int) -> int:
    """Microbatches of which a rank of the stage holds activations at most: as in the schedule."""
    schedule = interleaved(plan, num_microbatches=num_microbatches)
    rank = plan.modules[stage.module].stage_ranks(stage.stage)[0]
    return peak_live(schedule, rank, stage.module, stage=stage.stage)


def _place_tasks(
    plan: Plan, place: int, *, num_microbatches: int, num_ahead: int, forward_only: bool
) -> list[Task]:
    """Tasks of one place of the language model's pipeline.

    The warm-up takes all but the last of its stages through one round, and ``num_ahead`` tasks.

    Source:
        Narayanan et al., 2021, arXiv:2104.04473, section 2.2.2.
    """
    pp = plan.language.pipeline_model_parallel_size
    virtual = plan.language.virtual_pipeline_model_parallel_size
    turns = [
        (turn, (m,))
        for first in range(0, num_microbatches, pp)
        for turn in range(virtual)
        for m in range(first, min(first + pp, num_microbatches))
    ]
    forward = [Task("F", LANGUAGE, turn * pp + place, m) for turn, m in turns]
    backward = [Task("B", LANGUAGE, (virtual - 1 - turn) * pp + place, m) for turn, m in turns]
    warm_up = num_ahead + (virtual - 1) * pp
    return forward if forward_only else _alternate(forward, backward, warm_up=warm_up)


def _alternate(forward: list[Task], backward: list[Task], *, warm_up: int) -> list[Task]:
    """After the warm-up forward and backward tasks take turns."""
    warm_up = min(warm_up, len(forward))
    steady = zip(forward[warm_up:], backward, strict=False)
    in_turn = [task for pair in steady for task in pair]
    return [*forward[:warm_up], *in_turn, *backward[len(forward) - warm_up :]]


def _ticks_before_language(plan: Plan) -> dict[Stage, int]:
    """How much earlier than the first language stage each encoder stage runs a microbatch."""
    distances = stage_distances(plan)
    return {s: distances[s] - distances[Stage(LANGUAGE, 0)] for s in encoder_stages(plan)}
