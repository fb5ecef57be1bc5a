"""Places encoder tasks around a language model's pipeline."""

from collections.abc import Iterator, Mapping
from itertools import accumulate, chain, pairwise
from typing import NamedTuple

import numpy as np

from megatron_mosaic.errors import PlanError
from megatron_mosaic.layout.placement import LANGUAGE
from megatron_mosaic.layout.plan import Plan
from megatron_mosaic.schedule.clock import due_tasks
from megatron_mosaic.schedule.colocated import encoder_groups, encoder_stages, language_pipeline
from megatron_mosaic.schedule.graph import (
    RankKind,
    Stage,
    ahead_modules,
    needs_backward,
    rank_kinds,
    stage_distances,
)
from megatron_mosaic.schedule.interleaved import MEGATRON_LEAD, language_order
from megatron_mosaic.schedule.lanes import lane_of
from megatron_mosaic.schedule.list_scheduling import Sequence, Work, best_sequence
from megatron_mosaic.schedule.parts import Part, lanes_of_parts, parts_of
from megatron_mosaic.schedule.program import START, TaskArrays, data_inputs, links_in_a_step
from megatron_mosaic.schedule.schedule import Schedule
from megatron_mosaic.schedule.simulate import LaneTimes, PassTimes
from megatron_mosaic.schedule.steps import Edge, edges_of
from megatron_mosaic.schedule.task import Task

_LISTED_TASKS = 50_000
"""Tasks in all lists of a search together, about: one to two seconds. One list is always made."""

_MAX_LISTS = 10

Key = tuple[int, Task]  # a part, and a task of its stage


class _Filled(NamedTuple):
    """Tasks of all parts in an order that fills waits."""

    keys: list[Key]
    sequence: Sequence


def fill(
    plan: Plan,
    *,
    tasks_s: Mapping[Stage, PassTimes],
    transfers_s: Mapping[Edge, float] | None = None,
    lanes: LaneTimes | None = None,
) -> Schedule:
    """Puts encoder tasks into the waits of the language model's pipeline.

    The language model keeps the order of 1F1B; or one of interleaved 1F1B, with Megatron's
    warm-up or with the least, whichever leads to the shorter step. Whenever ranks are free they
    run the most urgent task whose inputs are there, as ``best_sequence`` has it. Encoder tasks
    wait for the gradients of earlier ones where the plan bounds the live ones; forward tasks of
    the next step have nothing after them and come last.

    Args:
        plan: The plan; its schedule is of the kind ``bubble_fill``, or ``concurrent``: then tasks
            of different lanes do not wait for each other to end.
        tasks_s: Of a stage's longest task.
        transfers_s: Of one microbatch over an edge, either way; 0 where there is none.
        lanes: Where tasks may share their ranks, the times that they then take.

    Raises:
        PlanError: The bound on live encoder tasks is below what the language model needs.

    Source:
        That encoders fit into the waits: Feng et al., 2024, arXiv:2408.03505 (Optimus).
    """
    kinds = rank_kinds(plan)
    # Ranks that receive a transfer between modules post it where they wait for it, and none gets
    # it before all have: if one came to its task late, after others that need the rest of them,
    # they would wait in a circle.
    fed = {edge.ends[1] for edge in edges_of(plan) if edge.source != edge.destination}
    parts = parts_of(plan, kinds, apart=True, together=fed)
    passes_s = _passes_s(plan, parts, tasks_s, lanes)
    orders = _language_orders(plan)
    bound = _encoder_bound(plan, orders)
    found = [
        _filled(plan, kinds, parts, order, bound, passes_s, transfers_s or {})
        for order in orders
        if bound >= _live_groups(plan, order)
    ]
    keys, sequence = min(found, key=lambda filled: filled.sequence.makespan_s)
    own: list[list[Task]] = [[] for _ in kinds]
    for number in sequence.tasks:
        p, task = keys[number]
        for kind in parts[p].kinds:
            own[kind].append(task)
    tasks: list[tuple[Task, ...]] = [()] * plan.world_size
    for k, kind in enumerate(kinds):
        in_order = tuple(own[k])
        for rank in kind.ranks:
            tasks[rank] = in_order
    return Schedule(
        num_microbatches=plan.num_microbatches,
        forward_only=False,
        tasks=tuple(tasks),
        ahead=ahead_modules(plan),
        receives_early=True,
    )


def least_live(plan: Plan) -> int:
    """Fewest live tasks of an encoder with which the language model's pipeline can run."""
    return _fewest_live_groups(plan, _language_orders(plan))


def live_bound(plan: Plan, stage: Stage) -> int:
    """Live tasks that the plan allows a stage: the bound of encoders, else the pipeline's own.

    Raises:
        PlanError: The plan's bound is below what the language model needs.
    """
    if stage in encoder_stages(plan):
        return _encoder_bound(plan, _language_orders(plan))
    if not needs_backward(plan, stage.module):
        return 1
    if plan.language.virtual_pipeline_model_parallel_size == 1:
        return min(plan.num_microbatches, stage_distances(plan)[stage] + 1)
    return max(
        max(accumulate(1 if task.kind == "F" else -1 for task in order if task[1:3] == stage))
        for order in _language_orders(plan)
    )


def _encoder_bound(plan: Plan, orders: list[list[Task]]) -> int:
    """Live tasks that the plan allows every stage of an encoder."""
    least = _fewest_live_groups(plan, orders)
    groups = encoder_groups(plan, num_microbatches=plan.num_microbatches)
    bound = plan.schedule.max_live or len(groups)
    if bound < least:
        raise PlanError(
            f"schedule: max_live={bound} must be >= {least}, the encoder tasks that the language "
            f"model's pipeline has in flight; raise it or the encoder_group"
        )
    return bound


def _language_orders(plan: Plan) -> list[list[Task]]:
    """Orders of the language model and what it feeds; in each all tasks after their inputs."""
    num_microbatches = plan.num_microbatches
    if plan.language.virtual_pipeline_model_parallel_size > 1:
        orders = []
        for lead in (MEGATRON_LEAD, 1):
            times = language_order(plan, num_microbatches=num_microbatches, lead=lead)
            orders.append(sorted(times, key=lambda task, times=times: times[task]))
    else:
        clock, pipeline = language_pipeline(plan, forward_only=False)
        due = due_tasks(clock, pipeline, num_microbatches=num_microbatches)
        orders = [[task for _, task in sorted(due, key=lambda item: item[0])]]
    backward = {name: needs_backward(plan, name) for name in plan.modules}
    return [[task for task in own if task.kind == "F" or backward[task.module]] for own in orders]


def _fewest_live_groups(plan: Plan, orders: list[list[Task]]) -> int:
    return min(_live_groups(plan, order) for order in orders)


def _live_groups(plan: Plan, order: list[Task]) -> int:
    """Groups of an encoder of which the first language stage has microbatches in flight at most.

    A group that has begun there counts until the backward passes of all of it have ended.
    """
    groups = encoder_groups(plan, num_microbatches=plan.num_microbatches)
    group_of = {m: g for g, group in enumerate(groups) for m in group}
    left = [len(group) for group in groups]
    num_done, most = 0, 1
    for task in order:
        if task[1:3] == (LANGUAGE, 0):
            group = group_of[task.microbatches[0]]
            left[group] -= task.kind == "B"
            most = max(most, group - num_done + 1)
            while num_done < len(groups) and not left[num_done]:
                num_done += 1
    return most


def _passes_s(
    plan: Plan,
    parts: tuple[Part, ...],
    tasks_s: Mapping[Stage, PassTimes],
    lanes: LaneTimes | None,
) -> list[PassTimes]:
    """Times of every part: the shared ones where another lane runs on any of its ranks."""
    if lanes is None:
        return [tasks_s[part.stage] for part in parts]
    lanes_on: dict[int, set[str]] = {}
    for part in parts:
        for kind in part.kinds:
            lanes_on.setdefault(kind, set()).add(lane_of(plan, part.stage.module))
    is_shared = [any(len(lanes_on[kind]) > 1 for kind in part.kinds) for part in parts]
    return [
        (lanes.shared_s if shared else tasks_s)[part.stage]
        for part, shared in zip(parts, is_shared, strict=True)
    ]


def _filled(
    plan: Plan,
    kinds: tuple[RankKind, ...],
    parts: tuple[Part, ...],
    order: list[Task],
    bound: int,
    passes_s: list[PassTimes],
    transfers_s: Mapping[Edge, float],
) -> _Filled:
    """Fills the waits of one order of the language model."""
    keys = _keys(plan, parts, order)
    machines = lanes_of_parts(plan, parts)
    work = Work.of(
        [machines[p] for p, _ in keys],
        [passes_s[p][task.kind == "B"] for p, task in keys],
        chain(
            _orders(parts, machines, keys, bound, frozenset(encoder_stages(plan))),
            _inputs(plan, kinds, parts, keys, transfers_s),
        ),
    )
    max_lists = max(1, min(_MAX_LISTS, _LISTED_TASKS // len(keys)))
    return _Filled(keys, best_sequence(work, max_lists=max_lists))


def _inputs(
    plan: Plan,
    kinds: tuple[RankKind, ...],
    parts: tuple[Part, ...],
    keys: list[Key],
    transfers_s: Mapping[Edge, float],
) -> Iterator[tuple[int, int, float]]:
    """Pairs of tasks of which the second takes what the first makes, and the time on the way."""
    edges = edges_of(plan)
    lags_s = [*(transfers_s.get(edge, 0.0) for edge in edges), 0.0]
    rows = [(p, t.kind == "B", t.microbatches[0], len(t.microbatches)) for p, t in keys]
    arrays = TaskArrays(*np.array(rows, dtype=np.int64).T)
    links = links_in_a_step(plan, kinds, parts, ahead_modules(plan))
    for inputs in data_inputs(arrays, links, len(parts), no_edge=len(edges)):
        for after, before, edge, passed in zip(*map(np.ndarray.tolist, inputs), strict=True):
            if before != START:
                yield before, after, lags_s[edge] * passed


def _keys(plan: Plan, parts: tuple[Part, ...], order: list[Task]) -> list[Key]:
    """Tasks of all parts; those of the language model's pipeline in their order."""
    places: dict[tuple[str, int], list[int]] = {}
    for p, part in enumerate(parts):
        places.setdefault(part.stage, []).append(p)
    keys = [(p, task) for task in order for p in places[task[1:3]]]
    encoders = encoder_stages(plan)
    groups = encoder_groups(plan, num_microbatches=plan.num_microbatches)
    for p, part in enumerate(parts):
        if part.stage in encoders:
            keys += [(p, Task("F", *part.stage, group)) for group in groups]
            if needs_backward(plan, part.stage.module):
                keys += [(p, Task("B", *part.stage, group)) for group in groups]
    return keys


def _orders(
    parts: tuple[Part, ...],
    machines: tuple[tuple[int, ...], ...],
    keys: list[Key],
    bound: int,
    encoders: frozenset[Stage],
) -> Iterator[tuple[int, int, float]]:
    """Pairs of tasks of which the second comes later whatever their inputs; without time between.

    Those are tasks of the language model's pipeline in one lane of a rank, of one stage and pass,
    the two passes of one task, and those of an encoder of which the first frees the second's
    memory.
    """
    pairs: list[tuple[int, int]] = []
    # Of an encoder's parts the positions of their tasks by pass, of the others those by lane.
    passes: dict[tuple[int, str], list[int]] = {}
    in_lane: dict[int, list[int]] = {}
    forward: dict[tuple[int, int], int] = {}
    is_encoder = [part.stage in encoders for part in parts]
    for position, (p, task) in enumerate(keys):
        if is_encoder[p]:
            passes.setdefault((p, task.kind), []).append(position)
        else:
            for machine in machines[p]:
                in_lane.setdefault(machine, []).append(position)
        if task.kind == "F":
            forward[p, task.microbatches[0]] = position
        else:
            pairs.append((forward[p, task.microbatches[0]], position))
    for (p, kind), positions in passes.items():
        if kind == "B":
            pairs += zip(positions, passes[p, "F"][bound:], strict=False)
        pairs += pairwise(positions)
    for positions in in_lane.values():
        pairs += pairwise(positions)
    return ((first, second, 0.0) for first, second in pairs)
