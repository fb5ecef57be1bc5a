"""The program of a plan's schedule, without building its lists of tasks.

The builders make a list of tuples for every rank, for the engine to walk; a planner that weighs
many plans of thousands of tasks has no time for that. Here the same due times are columns of
numbers, and sorted as such. A test holds both to the same order.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from megatron_mosaic.layout.plan import Plan
from megatron_mosaic.schedule import colocated
from megatron_mosaic.schedule.build import build_schedule
from megatron_mosaic.schedule.clock import Clock
from megatron_mosaic.schedule.graph import Stage, needs_backward, stage_distances, stage_order
from megatron_mosaic.schedule.program import Integers, Program, TaskArrays, program_of, wire


class _Due(NamedTuple):
    """Tasks of one stage and kind, and numbers by which they are sorted."""

    stage: Stage
    backward: bool
    first: Integers
    count: Integers
    due: Integers


def program_of_plan(
    plan: Plan, *, num_microbatches: int | None = None, forward_only: bool = False
) -> Program:
    """Makes the program of the schedule that ``build_schedule`` builds.

    Args:
        plan: The plan.
        num_microbatches: Microbatches of the step, at least one; ``None`` takes the plan's.
        forward_only: Leaves the backward tasks out.
    """
    total = plan.num_microbatches if num_microbatches is None else num_microbatches
    if plan.schedule.kind in ("interleaved", "bubble_fill"):
        schedule = build_schedule(plan, num_microbatches=total, forward_only=forward_only)
        return program_of(plan, schedule)
    due = {"no_pipelining": _one_by_one, "1f1b": _pipelined, "colocated": _grouped}
    number = {stage: index for index, stage in enumerate(stage_order(plan))}
    backward = {name: not forward_only and needs_backward(plan, name) for name in plan.modules}
    parts = [
        part
        for part in due[plan.schedule.kind](plan, total, forward_only=forward_only)
        if backward[part.stage.module] or not part.backward
    ]
    lengths = [len(part.first) for part in parts]
    order = np.argsort(np.concatenate([part.due for part in parts]), kind="stable")
    columns = (
        np.repeat([number[part.stage] for part in parts], lengths),
        np.repeat([int(part.backward) for part in parts], lengths),
        np.concatenate([part.first for part in parts]),
        np.concatenate([part.count for part in parts]),
    )
    return wire(plan, TaskArrays(*(column[order] for column in columns)))


def _one_by_one(plan: Plan, num_microbatches: int, *, forward_only: bool) -> Iterator[_Due]:
    stages = stage_order(plan)
    microbatch = np.arange(num_microbatches)
    one = np.ones_like(microbatch)
    for position, stage in enumerate(stages):
        start = 2 * len(stages) * microbatch
        yield _Due(stage, False, microbatch, one, start + position)
        yield _Due(stage, True, microbatch, one, start + 2 * len(stages) - 1 - position)


def _pipelined(plan: Plan, num_microbatches: int, *, forward_only: bool) -> Iterator[_Due]:
    distances = stage_distances(plan)
    clock = Clock(depth=max(distances.values()), backward=not forward_only)
    return _half_ticks(clock, distances, num_microbatches)


def _half_ticks(clock: Clock, distances: dict[Stage, int], num_microbatches: int) -> Iterator[_Due]:
    """Tasks as ``due_tasks`` has them; of two that are due at once the earlier stage is first."""
    # The clock only adds and multiplies, so it takes all microbatches at once.
    microbatch: Any = np.arange(num_microbatches)
    one = np.ones_like(microbatch)
    for stage, distance in distances.items():
        start: Any = clock.forward_start(microbatch, distance=distance)
        yield _Due(stage, False, microbatch, one, 2 * start + 1)
        if clock.backward:
            start = clock.backward_start(microbatch, distance=distance)
            yield _Due(stage, True, microbatch, one, 2 * start + 2)


def _grouped(plan: Plan, num_microbatches: int, *, forward_only: bool) -> Iterator[_Due]:
    clock, pipeline = colocated.language_pipeline(plan, forward_only=forward_only)
    num_stages = len(stage_order(plan))

    def number(half_tick: Any, phase: int, group: int = 0, stage: int = 0) -> Any:
        # The fields of a due time become the digits of one number; the last may be negative.
        return ((4 * half_tick + phase) * num_microbatches + group) * 2 * num_stages + stage

    for part in _half_ticks(clock, pipeline, num_microbatches):
        yield part._replace(due=number(part.due, colocated.LANGUAGE_PHASE))
    due_of: dict[tuple[Stage, bool], list[tuple[int, int, int]]] = {}
    for due, task in colocated.encoder_due(plan, clock, num_microbatches=num_microbatches):
        row = task.microbatches[0], len(task.microbatches), number(*due)
        due_of.setdefault((Stage(task.module, task.stage), task.kind == "B"), []).append(row)
    for (stage, backward), rows in due_of.items():
        yield _Due(stage, backward, *np.array(rows).T)
