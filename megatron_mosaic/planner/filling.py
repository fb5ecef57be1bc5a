"""Layouts with encoder tasks in the waits of their pipeline: in groups, in chunks, a step ahead."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from math import inf

from megatron_mosaic.cost.cost_model import CostModel
from megatron_mosaic.cost.layer_split import even_split
from megatron_mosaic.cost.plan_memory import task_microbatches
from megatron_mosaic.layout.plan import Plan
from megatron_mosaic.planner.candidate import Candidate, EncoderChoice
from megatron_mosaic.planner.legal_sizes import divisors
from megatron_mosaic.planner.problem import Problem
from megatron_mosaic.planner.simulated import Simulated, plan_under
from megatron_mosaic.schedule.fill import fill, least_live
from megatron_mosaic.schedule.graph import rank_kinds
from megatron_mosaic.schedule.order import write_order

MAX_FILLED_TASKS = 10_000
"""Tasks of a step up to which they are placed one by one into the waits of others: a second."""

_MORE_LIVE = (2, 1)
"""Encoder tasks above the fewest that are live where modules run at the same time, if they fit."""

LEAST_GAIN = 0.001
"""Share of a step that is too little to be worth another schedule, or smaller parts."""


def filled(first: Simulated, problem: Problem, cost_model: CostModel) -> Iterator[Simulated]:
    """Yields a colocated layout with encoder tasks in the waits of its pipeline.

    Smaller groups fit into smaller waits, until their tasks take longer than what that saves.

    Args:
        first: The layout under the schedule of its closed form.
        problem: What is asked.
        cost_model: What things cost.
    """
    candidate = first.candidate
    if candidate.kind != "colocated" or candidate.language.pp == 1:
        return
    fastest_s = inf
    samples = candidate.micro_batch_size * candidate.language.dp
    most = max(encoder.sizes.dp for encoder in candidate.encoders)
    whole = candidate.encoder_group == first.estimate.num_microbatches
    for group in divisors(candidate.encoder_group)[-1 - whole :: -1]:
        if group * samples < most or problem.pins.encoder_group not in (None, group):
            continue
        other = replace(candidate, kind="bubble_fill", encoder_group=group)
        entry = ordered(first, other, first.layers_per_stage, problem, cost_model)
        if entry is not None:
            if entry.step_s > fastest_s:
                return
            fastest_s = entry.step_s
            yield entry


def refined(entry: Simulated, problem: Problem, cost_model: CostModel) -> Simulated:
    """Finds out whether a layout gains from frozen encoders a step ahead, and from layer chunks.

    Chunks are the stages of an encoder on ranks of the language model: one after the other they
    fit into waits that are too short for all layers. Their number doubles while that gains.

    Args:
        entry: The layout under the fastest schedule that has neither.
        problem: What is asked.
        cost_model: What things cost.

    Returns:
        The fastest, the entry itself if nothing is faster.
    """
    candidate, split = entry.candidate, entry.layers_per_stage
    best = entry
    if _runs_ahead(candidate, problem):
        ahead = replace(candidate, kind="bubble_fill", ahead=True)
        best = _faster(best, ordered(entry, ahead, split, problem, cost_model))
    candidate, chunks = replace(best.candidate, kind="bubble_fill"), 2
    num_groups = entry.estimate.num_microbatches // candidate.encoder_group
    if num_groups == 1 and not candidate.ahead:
        return best  # language waits for the whole batch, in one piece or in several
    while (cut := _in_chunks(candidate, split, chunks, problem)) is not None:
        faster = _faster(best, ordered(entry, *cut, problem, cost_model))
        if faster is best:
            break
        best, chunks = faster, 2 * chunks
    return best


def _runs_ahead(candidate: Candidate, problem: Problem) -> bool:
    """Whether a candidate has frozen encoders, and waits that they may fill."""
    modules = problem.model.modules
    frozen = [e for e in candidate.encoders if modules[e.name].trainable == ()]
    return any(candidate.language.pp > 1 or not encoder.shares for encoder in frozen)


def _in_chunks(
    candidate: Candidate, split: Mapping[str, tuple[int, ...]], chunks: int, problem: Problem
) -> tuple[Candidate, Mapping[str, tuple[int, ...]]] | None:
    """Cuts encoders on ranks of the language model; None if there is none with so many layers."""

    def is_cut(encoder: EncoderChoice) -> bool:
        pinned = "layers_per_stage" in problem.pins.modules.get(encoder.name, {})
        return encoder.shares and not pinned and sum(split[encoder.name]) >= chunks

    cut = {e.name: even_split(sum(split[e.name]), chunks) for e in candidate.encoders if is_cut(e)}
    if not cut or candidate.language.pp == 1:
        return None
    encoders = tuple(
        replace(encoder, sizes=replace(encoder.sizes, chunks=chunks))
        if encoder.name in cut
        else encoder
        for encoder in candidate.encoders
    )
    return replace(candidate, encoders=encoders), {**split, **cut}


def _faster(best: Simulated, other: Simulated | None) -> Simulated:
    gains = other is not None and other.step_s < best.step_s * (1 - LEAST_GAIN)
    return other if other is not None and gains else best


def ordered(
    first: Simulated,
    candidate: Candidate,
    split: Mapping[str, tuple[int, ...]],
    problem: Problem,
    cost_model: CostModel,
) -> Simulated | None:
    """Simulates a candidate in an order of its own; None if it does not fit or is too long.

    Where too many tasks are live for the memory, as few are as the pipeline allows; or a few more
    where modules run at the same time, as then a task begins while one before is in use. A
    placement that the user has fixed holds: with encoders in chunks a layout is not homogeneous
    any more.
    """
    if problem.pins.placement not in (None, candidate.placement):
        return None
    plan = plan_under(candidate, split, problem)
    if num_tasks(plan) > MAX_FILLED_TASKS:
        return None
    more = _MORE_LIVE if candidate.kind == "concurrent" else ()
    for above in (None, *more, 0):
        bound = None if above is None else least_live(plan) + above
        limited = replace(plan, schedule=replace(plan.schedule, max_live=bound))
        ordered_plan = with_order(limited, cost_model)
        memory = cost_model.plan_memory(ordered_plan).values()
        if max(sum(terms.values()) for terms in memory) <= problem.memory_bytes:
            step = cost_model.estimate(ordered_plan)
            return Simulated(first.estimate, candidate, split, ordered_plan, step, True)
    return None


def num_tasks(plan: Plan) -> int:
    """Tasks of a step, those of an encoder for each stage of the language model that it is on."""
    return sum(
        2 * plan.num_microbatches // task_microbatches(plan, stage.module)
        for kind in rank_kinds(plan)
        for stage in kind.stages
    )


def with_order(plan: Plan, cost_model: CostModel) -> Plan:
    """Gives a plan the order of tasks that fills the waits which the durations leave."""
    order = write_order(plan, fill(plan, **cost_model.plan_durations(plan)._asdict()))
    return replace(plan, schedule=replace(plan.schedule, order=order))
