"""Encoders that may share ranks with a pipelined language model."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from megatron_mosaic.layout.placement import LANGUAGE
from megatron_mosaic.layout.plan import Plan
from megatron_mosaic.schedule.clock import Clock, pipeline_due
from megatron_mosaic.schedule.graph import (
    Stage,
    needs_backward,
    stage_distances,
    stage_order,
    upstream,
)
from megatron_mosaic.schedule.task_arrays import DueTasks, TaskArrays, in_order

# Phases of one half tick. A language backward pass in the middle of its two ticks lets the
# encoder's forward pass go first, because the first language stage waits for it; and goes before
# the encoder's backward pass, whose gradient is only just coming.
_FORWARD_EARLY, _LANGUAGE, _BACKWARD, _FORWARD_LATE = range(4)


def colocated(plan: Plan, *, num_microbatches: int, forward_only: bool = False) -> TaskArrays:
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
    groups = encoder_groups(plan, num_microbatches=num_microbatches)
    num_groups = len(groups)
    due = [
        *(
            tasks._replace(due=_due(tasks.due, _LANGUAGE, num_groups=num_groups))
            for tasks in pipeline_due(clock, pipeline, num_microbatches=num_microbatches)
        ),
        *_encoders_due(plan, clock, groups),
    ]
    return in_order(plan, due, forward_only=forward_only)


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
    return Clock(depth=distances[Stage(LANGUAGE, 0)], backward=backward), pipeline


def encoder_stages(plan: Plan) -> tuple[Stage, ...]:
    """Stages that do not depend on the language model, in the order of the data."""
    return tuple(
        stage
        for stage in stage_order(plan)
        if LANGUAGE not in upstream(plan, stage.module) | {stage.module}
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
    in_pipeline = -(-distances[Stage(LANGUAGE, 0)] // len(groups[0]))
    return min(len(groups), 1 + in_pipeline + _groups_ahead(plan, stage.module))


def _due(half_tick: Any, phase: int, group: Any = 0, *, num_groups: int) -> Any:
    """One number to sort by half tick, then phase, then group."""
    return (4 * half_tick + phase) * num_groups + group


def _encoders_due(plan: Plan, clock: Clock, groups: list[tuple[int, ...]]) -> Iterator[DueTasks]:
    """Tasks of all encoder stages; backward passes from the last stage to the first."""
    first = np.array([group[0] for group in groups])
    count = np.array([len(group) for group in groups])
    # Where a group starts just when another ends, the one that ends frees its memory first.
    meets_end = clock.depth % len(groups[0]) == 0
    phase = _FORWARD_LATE if meets_end else _FORWARD_EARLY
    stages, number = encoder_stages(plan), np.arange(len(groups))
    for stage in stages:
        ahead = _groups_ahead(plan, stage.module)
        # The clock takes all groups at once.
        wanted: Any = first[np.maximum(number - ahead, 0)]
        start: Any = clock.forward_start(wanted, distance=clock.depth)
        yield DueTasks(
            stage, False, first, count, _due(2 * start, phase, number, num_groups=len(groups))
        )
    if clock.backward:
        last: Any = first + count - 1
        end: Any = clock.backward_end(last, distance=clock.depth)
        for stage in reversed(stages):
            yield DueTasks(
                stage, True, first, count, _due(2 * end, _BACKWARD, number, num_groups=len(groups))
            )


def _groups_ahead(plan: Plan, module: str) -> int:
    """Groups an encoder starts early: one if it waits for no rank of the language model.

    Then it works while the language model does, at the cost of one more live group. On shared
    ranks the language model would have to wait for that work.
    """
    language = set(plan.language.ranks)
    behind = upstream(plan, module) | {module}
    return int(all(language.isdisjoint(plan.modules[name].ranks) for name in behind))
