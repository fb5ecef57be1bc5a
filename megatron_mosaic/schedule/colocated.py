"""Encoders that may share ranks with a pipelined language model."""

from typing import NamedTuple

from megatron_mosaic.layout.plan import Plan
from megatron_mosaic.schedule.clock import Clock, due_tasks
from megatron_mosaic.schedule.graph import (
    Stage,
    needs_backward,
    stage_distances,
    stage_order,
    upstream,
)
from megatron_mosaic.schedule.schedule import Schedule, restrict
from megatron_mosaic.schedule.task import Task


class Due(NamedTuple):
    """Where a task stands in the common order; compared field by field."""

    half_tick: int
    phase: int
    group: int = 0
    stage: int = 0


# Phases of one half tick. A language backward pass in the middle of its two ticks lets the
# encoder's forward pass go first, because the first language stage waits for it; and goes before
# the encoder's backward pass, whose gradient is only just coming.
_FORWARD_EARLY, LANGUAGE_PHASE, _BACKWARD, _FORWARD_LATE = range(4)


def colocated(plan: Plan, *, num_microbatches: int, forward_only: bool = False) -> Schedule:
    """Puts encoder tasks over groups of microbatches into the language model's 1F1B.

    The forward task of a group runs when the first language stage is due to start the group's
    first microbatch, the backward task when that stage is due to have ended its last one. Every
    rank does so at about that time, whichever language stage it hosts: the pipeline pauses but
    does not drain. With one group for the whole batch this is the three-phase schedule.
    """
    # Vision in groups of two microbatches on ranks 0-1, language in two stages on ranks 0 and 1.
    #
    # rank 0  vF0-1 F0 F1 B0 vF2-3 F2 B1 vB0-1 F3 B2 B3 vB2-3
    # rank 1  vF0-1 F0 B0 F1 vF2-3 B1 F2 B2 vB0-1 F3 B3 vB2-3
    #
    # Not on rank 1: ... B1 vB0-1 vF2-3 F2, each next to its own language tasks. There vB0-1 waits
    # for B1 on rank 0, which comes after F2, which waits for vF2-3 on rank 1: a deadlock.
    #
    # Vision on rank 2 alone looks one group ahead and works while the language model does.
    #
    # rank 2  vF0-1 vF2-3 vB0-1 vB2-3
    clock, pipeline = language_pipeline(plan, forward_only=forward_only)
    tasks = due_tasks(clock, pipeline, num_microbatches=num_microbatches)
    due = [(Due(middle, LANGUAGE_PHASE), task) for middle, task in tasks]
    due += encoder_due(plan, clock, num_microbatches=num_microbatches)
    return restrict(
        (task for _, task in sorted(due, key=lambda item: item[0])),
        plan=plan,
        num_microbatches=num_microbatches,
        forward_only=forward_only,
    )


def language_pipeline(plan: Plan, *, forward_only: bool) -> tuple[Clock, dict[Stage, int]]:
    """Clock of the language model's pipeline, and the distances of its stages.

    Modules that the language model feeds are behind it in this pipeline.
    """
    distances = stage_distances(plan)
    encoders = encoder_stages(plan)
    pipeline = {stage: d for stage, d in distances.items() if stage not in encoders}
    # A frozen language model may feed a trainable module.
    trains = any(needs_backward(plan, stage.module) for stage in pipeline)
    backward = not forward_only and trains
    return Clock(depth=distances[Stage("language", 0)], backward=backward), pipeline


def encoder_due(plan: Plan, clock: Clock, *, num_microbatches: int) -> list[tuple[Due, Task]]:
    """Tasks of all encoder stages."""
    groups = encoder_groups(plan, num_microbatches=num_microbatches)
    due = []
    for position, stage in enumerate(encoder_stages(plan)):
        ahead = _groups_ahead(plan, stage.module)
        due += _encoder_due(clock, stage, groups, position=position, ahead=ahead)
    return due


def encoder_stages(plan: Plan) -> tuple[Stage, ...]:
    """Stages that do not depend on the language model, in the order of the data."""
    return tuple(
        stage
        for stage in stage_order(plan)
        if "language" not in upstream(plan, stage.module) | {stage.module}
    )


def encoder_groups(plan: Plan, *, num_microbatches: int) -> list[tuple[int, ...]]:
    """Microbatches of every encoder task; the last group may be shorter."""
    size = plan.schedule.group_size(num_microbatches)
    starts = range(0, num_microbatches, size)
    return [tuple(range(m, min(m + size, num_microbatches))) for m in starts]


def max_live(plan: Plan, stage: Stage, *, num_microbatches: int) -> int:
    """Tasks of which a rank of the stage holds activations at most.

    When a group starts, those are live that hold one of the last ``depth`` microbatches of the
    first language stage, and the groups that were started ahead.
    """
    distances = stage_distances(plan)
    if stage not in encoder_stages(plan):
        return min(num_microbatches, distances[stage] + 1)
    groups = encoder_groups(plan, num_microbatches=num_microbatches)
    in_pipeline = -(-distances[Stage("language", 0)] // len(groups[0]))
    return min(len(groups), 1 + in_pipeline + _groups_ahead(plan, stage.module))


def _encoder_due(
    clock: Clock, stage: Stage, groups: list[tuple[int, ...]], *, position: int, ahead: int
) -> list[tuple[Due, Task]]:
    """Tasks of one encoder stage, ``position`` among all, started ``ahead`` groups early."""
    # Where a group starts just when another ends, the one that ends frees its memory first.
    meets_end = clock.depth % len(groups[0]) == 0
    phase = _FORWARD_LATE if meets_end else _FORWARD_EARLY
    due = []
    for g, group in enumerate(groups):
        start = clock.forward_start(groups[max(g - ahead, 0)][0], distance=clock.depth)
        due.append((Due(2 * start, phase, g, position), Task("F", *stage, group)))
        if clock.backward:
            end = clock.backward_end(group[-1], distance=clock.depth)
            due.append((Due(2 * end, _BACKWARD, g, -position), Task("B", *stage, group)))
    return due


def _groups_ahead(plan: Plan, module: str) -> int:
    """Groups an encoder starts early: one if it waits for no rank of the language model.

    Then it works while the language model does, at the cost of one more live group. On shared
    ranks the language model would have to wait for that work.
    """
    language = set(plan.language.ranks)
    behind = upstream(plan, module) | {module}
    return int(all(language.isdisjoint(plan.modules[name].ranks) for name in behind))
