"""Places encoder tasks around a language model's pipeline, most urgent task first."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from itertools import accumulate, pairwise

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
)
from megatron_mosaic.schedule.interleaved import language_order
from megatron_mosaic.schedule.parts import Part, parts_of
from megatron_mosaic.schedule.program import START, TaskArrays, data_inputs, links_in_a_step
from megatron_mosaic.schedule.schedule import Schedule
from megatron_mosaic.schedule.simulate import PassTimes
from megatron_mosaic.schedule.steps import Edge, edges_of
from megatron_mosaic.schedule.task import Task

Key = tuple[int, Task]  # a part, and a task of its stage


@dataclass(slots=True)
class _Unit:
    """One task of one part, and what comes after it with the time on the way."""

    key: Key
    kinds: tuple[int, ...]
    length_s: float
    after: list[tuple[int, float]] = field(default_factory=list)
    num_before: int = 0
    ready_s: float = 0.0
    tail_s: float = 0.0
    started: bool = False


def fill(
    plan: Plan,
    *,
    tasks_s: Mapping[Stage, PassTimes],
    transfers_s: Mapping[Edge, float] | None = None,
) -> Schedule:
    """Puts encoder tasks into the waits of the language model's pipeline.

    The language model keeps the order of 1F1B, or of interleaved 1F1B. Whenever ranks are free
    they run the task that has the longest way to the end of the step before it, of those whose
    inputs are there. Encoder tasks wait for the gradients of earlier ones where the plan bounds
    the live ones; forward tasks of the next step have nothing after them and come last.

    Args:
        plan: The plan; its schedule is of the kind ``bubble_fill``.
        tasks_s: Of a stage's longest task.
        transfers_s: Of one microbatch over an edge, either way; 0 where there is none.

    Raises:
        PlanError: The bound on live encoder tasks is below what the language model needs.

    Source:
        List scheduling by the length of the critical path: Graham, 1969, SIAM J. Appl. Math.
        17(2). That encoders fit into the waits: Feng et al., 2024, arXiv:2408.03505 (Optimus).
    """
    kinds = rank_kinds(plan)
    units = _units(plan, kinds, tasks_s, transfers_s or {})
    starts = _run(units, num_kinds=len(kinds))
    order = sorted(range(len(units)), key=lambda u: (starts[u], u))
    tasks: list[tuple[Task, ...]] = [()] * plan.world_size
    for k, kind in enumerate(kinds):
        own = tuple(units[u].key[1] for u in order if k in units[u].kinds)
        for rank in kind.ranks:
            tasks[rank] = own
    return Schedule(
        num_microbatches=plan.num_microbatches,
        forward_only=False,
        tasks=tuple(tasks),
        ahead=ahead_modules(plan),
        receives_early=True,
    )


def base_order(plan: Plan) -> list[Task]:
    """Tasks of the language model and of what it feeds, all after those they depend on."""
    num_microbatches = plan.num_microbatches
    if plan.language.virtual_pipeline_model_parallel_size > 1:
        times = language_order(plan, num_microbatches=num_microbatches)
        order = sorted(times, key=lambda task: times[task])
    else:
        clock, pipeline = language_pipeline(plan, forward_only=False)
        due = due_tasks(clock, pipeline, num_microbatches=num_microbatches)
        order = [task for _, task in sorted(due, key=lambda item: item[0])]
    return [task for task in order if task.kind == "F" or needs_backward(plan, task.module)]


def least_live(plan: Plan) -> int:
    """Fewest live tasks of an encoder with which the language model's order can run."""
    groups = encoder_groups(plan, num_microbatches=plan.num_microbatches)
    group_of = {m: g for g, group in enumerate(groups) for m in group}
    left = [len(group) for group in groups]
    num_done, least = 0, 1
    for task in base_order(plan):
        if task[1:3] == (LANGUAGE, 0):
            group = group_of[task.microbatches[0]]
            left[group] -= task.kind == "B"
            least = max(least, group - num_done + 1)
            while num_done < len(groups) and not left[num_done]:
                num_done += 1
    return least


def live_bound(plan: Plan, stage: Stage) -> int:
    """Live tasks that the plan allows a stage: the bound of encoders, else the pipeline's own.

    Raises:
        PlanError: The plan's bound is below what the language model needs.
    """
    if stage not in encoder_stages(plan):
        own = [task for task in base_order(plan) if task[1:3] == stage]
        return max(accumulate(1 if task.kind == "F" else -1 for task in own))
    least, groups = least_live(plan), encoder_groups(plan, num_microbatches=plan.num_microbatches)
    bound = plan.schedule.max_live or len(groups)
    if bound < least:
        raise PlanError(
            f"schedule: max_live={bound} must be >= {least}, the encoder tasks that the language "
            f"model's pipeline has in flight; raise it or the encoder_group"
        )
    return bound


def _units(
    plan: Plan,
    kinds: tuple[RankKind, ...],
    tasks_s: Mapping[Stage, PassTimes],
    transfers_s: Mapping[Edge, float],
) -> list[_Unit]:
    """All tasks with what comes after them."""
    parts = parts_of(plan, kinds, apart=True)
    keys = _keys(plan, parts)
    units = [
        _Unit(key, parts[key[0]].kinds, tasks_s[parts[key[0]].stage]["FB".index(key[1].kind)])
        for key in keys
    ]
    edges, dependencies = edges_of(plan), _orders(plan, parts, keys)
    lags_s = [*(transfers_s.get(edge, 0.0) for edge in edges), 0.0]
    rows = [(p, t.kind == "B", t.microbatches[0], len(t.microbatches)) for p, t in keys]
    arrays = TaskArrays(*np.array(rows, dtype=np.int64).T)
    links = links_in_a_step(plan, kinds, parts, ahead_modules(plan))
    for inputs in data_inputs(arrays, links, len(parts), no_edge=len(edges)):
        for after, before, edge, passed in zip(*map(np.ndarray.tolist, inputs), strict=True):
            if before != START:
                dependencies.append((before, after, lags_s[edge] * passed))
    for before, after, lag_s in dependencies:
        units[before].after.append((after, lag_s))
        units[after].num_before += 1
    return units


def _keys(plan: Plan, parts: tuple[Part, ...]) -> list[Key]:
    """Tasks of all parts; those of the language model's pipeline in their order."""
    places: dict[tuple[str, int], list[int]] = {}
    for p, part in enumerate(parts):
        places.setdefault(part.stage, []).append(p)
    keys = [(p, task) for task in base_order(plan) for p in places[task[1:3]]]
    encoders = encoder_stages(plan)
    groups = encoder_groups(plan, num_microbatches=plan.num_microbatches)
    for p, part in enumerate(parts):
        if part.stage in encoders:
            keys += [(p, Task("F", *part.stage, group)) for group in groups]
            if needs_backward(plan, part.stage.module):
                keys += [(p, Task("B", *part.stage, group)) for group in groups]
    return keys


def _orders(plan: Plan, parts: tuple[Part, ...], keys: list[Key]) -> list[tuple[int, int, float]]:
    """Pairs of tasks of which the second comes later whatever their inputs; without time between.

    Those are tasks of the language model's pipeline on one rank, of one stage and pass, the two
    passes of one task, and those of an encoder of which the first frees the second's memory.
    """
    lists: dict[object, list[int]] = {}
    number = {key: position for position, key in enumerate(keys)}
    encoders = encoder_stages(plan)
    pairs: list[tuple[int, int]] = []
    for position, (p, task) in enumerate(keys):
        if parts[p].stage in encoders:
            lists.setdefault((task.kind, p), []).append(position)
        else:
            for kind in parts[p].kinds:
                lists.setdefault(kind, []).append(position)
        if task.kind == "B":
            pairs.append((number[p, task._replace(kind="F")], position))
    for p, part in enumerate(parts):
        if part.stage in encoders:
            bound = live_bound(plan, part.stage)
            # A frozen encoder has no backward tasks, and nothing to free.
            pairs += zip(lists.get(("B", p), ()), lists["F", p][bound:], strict=False)
    pairs += [pair for positions in lists.values() for pair in pairwise(positions)]
    return [(before, after, 0.0) for before, after in pairs]


def _run(units: list[_Unit], *, num_kinds: int) -> list[float]:
    """Starts of all units: at any time the most urgent that are ready, on ranks that are free."""
    _find_tails(units)
    starts = [0.0] * len(units)
    busy, waiting = [False] * num_kinds, [list[tuple[float, int]]() for _ in range(num_kinds)]
    # What happens when: a unit becomes ready, or, as ~unit, ends.
    events = [(0.0, u) for u, unit in enumerate(units) if not unit.num_before]
    heapify(events)
    while events:
        now_s, touched = events[0][0], set[int]()
        while events and events[0][0] == now_s:
            _, u = heappop(events)
            unit = units[u if u >= 0 else ~u]
            touched.update(unit.kinds)
            for kind in unit.kinds:
                if u < 0:
                    busy[kind] = False
                else:
                    heappush(waiting[kind], (-unit.tail_s, u))
            if u < 0:
                for event in _released(units, unit, now_s):
                    heappush(events, event)
        for kind in sorted(touched):
            u = None if busy[kind] else _most_urgent(units, waiting[kind], busy)
            if u is not None:
                starts[u] = now_s
                for other in units[u].kinds:
                    busy[other] = True
                units[u].started = True
                heappush(events, (now_s + units[u].length_s, ~u))
    assert all(unit.started for unit in units), "the dependencies must have no circle"
    return starts


def _find_tails(units: list[_Unit]) -> None:
    """Finds the longest way from the start of every unit to the end of the step."""
    num_before = [unit.num_before for unit in units]
    order = [u for u, count in enumerate(num_before) if not count]
    for u in order:
        for after, _ in units[u].after:
            num_before[after] -= 1
            if not num_before[after]:
                order.append(after)
    for u in reversed(order):
        ways_s = [lag_s + units[after].tail_s for after, lag_s in units[u].after]
        units[u].tail_s = units[u].length_s + max(ways_s, default=0.0)


def _released(units: list[_Unit], ended: _Unit, now_s: float) -> Iterator[tuple[float, int]]:
    """Units whose last missing input comes from the one that has ended."""
    for after, lag_s in ended.after:
        unit = units[after]
        unit.ready_s = max(unit.ready_s, now_s + lag_s)
        unit.num_before -= 1
        if not unit.num_before:
            yield unit.ready_s, after


def _most_urgent(
    units: list[_Unit], waiting: list[tuple[float, int]], busy: list[bool]
) -> int | None:
    """Takes the first waiting unit all of whose ranks are free."""
    kept = []
    found = None
    while waiting and found is None:
        entry = heappop(waiting)
        unit = units[entry[1]]
        if unit.started:
            continue
        if any(busy[kind] for kind in unit.kinds):
            kept.append(entry)
        else:
            found = entry[1]
    for entry in kept:
        heappush(waiting, entry)
    return found
