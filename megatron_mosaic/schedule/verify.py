"""Checks that a schedule does the work of its plan, in an order that can run."""

from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from functools import cache, partial
from typing import Literal, NamedTuple, get_args

from megatron_mosaic.errors import ScheduleError
from megatron_mosaic.layout.plan import Plan
from megatron_mosaic.schedule.build import max_live
from megatron_mosaic.schedule.drawing import draw
from megatron_mosaic.schedule.graph import Stage, needs_backward, rank_kinds
from megatron_mosaic.schedule.lanes import has_lanes, joins, lane_steps
from megatron_mosaic.schedule.races import accesses, find_race
from megatron_mosaic.schedule.rendezvous import Blocked, blocked_ranks, rows_finish
from megatron_mosaic.schedule.schedule import Schedule, peak_live
from megatron_mosaic.schedule.steps import (
    Edge,
    Post,
    Step,
    TransferKind,
    communicators,
    edges_of,
    needs_of,
    steps_of,
)
from megatron_mosaic.schedule.task import Task


class _Row(NamedTuple):
    """Ranks that host the same stages and have the same list of tasks.

    Args:
        ranks: The ranks, ascending.
        hosted: The stages.
        tasks: The list.
    """

    ranks: tuple[int, ...]
    hosted: tuple[Stage, ...]
    tasks: tuple[Task, ...]


def verify(plan: Plan, schedule: Schedule) -> None:
    """Checks a schedule against its plan; the first fault wins.

    Every rank runs each task of the stages it hosts once, after those it depends on; all
    participants of an edge transfer its microbatches in one order; no rank waits for ever; and no
    rank holds the activations of more tasks than the schedule's kind promises. No two lanes of a
    rank use the same memory at the same time.

    Raises:
        ScheduleError: One of these does not hold. The message is one line; ``table`` shows the
            ranks concerned.
    """
    assert len(schedule.tasks) == plan.world_size
    rows = _rows(plan, schedule)
    _check_tasks(plan, schedule, rows)
    _check_order(plan, schedule, rows)
    steps = [steps_of(plan, schedule, row.ranks[0]) for row in rows]
    _check_transfers(plan, schedule, rows, steps)
    _check_progress(plan, schedule, rows, steps)
    _check_live(plan, schedule, rows)
    _check_races(plan, schedule, rows, steps)


def _rows(plan: Plan, schedule: Schedule) -> list[_Row]:
    """All ranks, in the order of the first of each row; replicas are not checked one by one."""
    kinds = rank_kinds(plan)
    idle = set(range(plan.world_size)).difference(*(kind.ranks for kind in kinds))
    found = []
    for stages, ranks in (*kinds, ((), sorted(idle))):
        # Builders give replicas one list; comparing thousands of tasks for each would take long.
        same: dict[int, list[int]] = {}
        for rank in ranks:
            same.setdefault(id(schedule.tasks[rank]), []).append(rank)
        found += [_Row(tuple(own), stages, schedule.tasks[own[0]]) for own in same.values()]
    return sorted(found, key=lambda row: row.ranks[0])


def _check_tasks(plan: Plan, schedule: Schedule, rows: Sequence[_Row]) -> None:
    groups = {name: _groups(plan, schedule, name) for name in plan.modules}
    for ranks, hosted, tasks in rows:
        expected = {
            Task(kind, *stage, group)
            for stage in hosted
            for group in groups[stage.module]
            for kind in _kinds(plan, schedule, stage.module)
        }
        counts = Counter(tasks)
        for task in counts:
            if task not in expected:
                names = ", ".join(f"{name}.{stage}" for name, stage in hosted) or "nothing"
                rule = f"must be a task that the plan needs of {names}; remove it"
                raise _error(schedule, ranks[:1], f"task={task} {rule}", at=task)
        for task in sorted(expected):
            if counts[task] != 1:
                advice = "add it" if counts[task] == 0 else "remove the others"
                rule = f"must run once, not {counts[task]} times; {advice}"
                raise _error(schedule, ranks[:1], f"task={task} {rule}", at=task)


def _groups(plan: Plan, schedule: Schedule, module: str) -> list[tuple[int, ...]]:
    """Microbatches of a module's tasks, as the first rank of its first stage has them."""
    rank = plan.modules[module].ranks[0]
    tasks = [task for task in schedule.tasks[rank] if task[:3] == ("F", module, 0)]
    groups = sorted(task.microbatches for task in tasks)
    if [m for group in groups for m in group] != list(range(schedule.num_microbatches)):
        shown = " ".join(str(task).split(" ", maxsplit=1)[0] for task in tasks)
        raise _error(
            schedule,
            [rank],
            f"tasks=[{shown}] of {module} must hold each of the {schedule.num_microbatches} "
            f"microbatches once; add or remove forward tasks",
        )
    return groups


def _kinds(plan: Plan, schedule: Schedule, module: str) -> tuple[Literal["F", "B"], ...]:
    forward_only = schedule.forward_only or not needs_backward(plan, module)
    return ("F",) if forward_only else ("F", "B")


def _check_order(plan: Plan, schedule: Schedule, rows: Sequence[_Row]) -> None:
    needs = needs_of(plan, schedule)
    for ranks, hosted, tasks in rows:
        producer = {(task.kind, task[1:3], m): task for task in tasks for m in task.microbatches}
        done: set[Task] = set()
        for task in tasks:
            for kind, stage in needs[task.kind, Stage(task.module, task.stage)]:
                if stage not in hosted:
                    continue
                for m in task.microbatches:
                    before = producer[kind, stage, m]
                    if before not in done:
                        rule = f"must come after {before}; move it behind"
                        raise _error(schedule, ranks[:1], f"task={task} {rule}", at=task)
            done.add(task)


def _check_transfers(
    plan: Plan, schedule: Schedule, rows: Sequence[_Row], steps: Sequence[Sequence[Step]]
) -> None:
    posts: defaultdict[tuple[int, TransferKind, Edge], list[int]] = defaultdict(list)
    for number, steps_of_row in enumerate(steps):
        for step in steps_of_row:
            if isinstance(step, Post):
                kind, edge, microbatch = step.transfer
                posts[number, kind, edge].append(microbatch)
    row_of = {rank: number for number, row in enumerate(rows) for rank in row.ranks}
    for edge in edges_of(plan):
        pairs: dict[tuple[int, int], tuple[int, int]] = {}
        for first, *others in communicators(plan, edge):
            for other in others:
                pairs.setdefault((row_of[first], row_of[other]), (first, other))
        for kind in get_args(TransferKind):
            for (row, other_row), ranks in pairs.items():
                orders = posts[row, kind, edge], posts[other_row, kind, edge]
                _check_equal_order(schedule, kind, edge, ranks, orders)


def _check_equal_order(
    schedule: Schedule,
    kind: TransferKind,
    edge: Edge,
    ranks: tuple[int, int],
    orders: tuple[list[int], list[int]],
) -> None:
    for expected, found in zip(*orders, strict=True):
        if expected != found:
            one, other = ranks
            ends = ((edge.source, edge.source_stage), (edge.destination, edge.destination_stage))
            at = next(
                task
                for task in schedule.tasks[other]
                if task[1:3] in ends and found in task.microbatches
            )
            raise _error(
                schedule,
                (other, one),
                f"microbatch={found} of {kind} {edge} must come after {expected}, as on rank "
                f"{one}; run the tasks of both ranks in the same order",
                at=at,
            )


def _check_progress(
    plan: Plan, schedule: Schedule, rows: Sequence[_Row], steps: Sequence[Sequence[Step]]
) -> None:
    if rows_finish(plan, [row.ranks for row in rows], steps):
        return
    every: list[Sequence[Step]] = [()] * plan.world_size
    for row, steps_of_row in zip(rows, steps, strict=True):
        for rank in row.ranks:
            every[rank] = steps_of_row
    blocked = {entry.rank: entry for entry in blocked_ranks(plan, every)}
    if not blocked:
        return
    circle = _circle(blocked)
    rank, task, _ = circle[0]
    chain = ", which waits for ".join(f"rank {entry.rank} at {entry.task}" for entry in circle[1:])
    raise _error(
        schedule,
        [entry.rank for entry in circle],
        f"task={task} must not wait in a circle: for {chain}, which waits for rank {rank}; "
        f"give these ranks' tasks one common order",
        faults={(entry.rank, entry.task) for entry in circle},
    )


def _circle(blocked: dict[int, Blocked]) -> list[Blocked]:
    """Ranks each of which waits for the next, and the last for the first."""
    path = [next(iter(blocked))]
    while (following := blocked[path[-1]].missing[0]) not in path:
        path.append(following)
    return [blocked[rank] for rank in path[path.index(following) :]]


def _check_live(plan: Plan, schedule: Schedule, rows: Sequence[_Row]) -> None:
    bound = cache(partial(max_live, plan, num_microbatches=schedule.num_microbatches))
    for ranks, hosted, _ in rows:
        for stage in hosted:
            live = peak_live(schedule, ranks[0], stage.module, stage=stage.stage)
            most = bound(stage)
            if live > most:
                raise _error(
                    schedule,
                    ranks[:1],
                    f"live={live} tasks of {_name(plan, stage)} must be <= {most}, the bound of "
                    f"kind={plan.schedule.kind}; run backward tasks earlier",
                )


def _check_races(
    plan: Plan, schedule: Schedule, rows: Sequence[_Row], steps: Sequence[Sequence[Step]]
) -> None:
    """Checks our own events: what a schedule says cannot make them wrong."""
    if not has_lanes(plan):
        return
    for row, steps_of_row in zip(rows, steps, strict=True):
        if row.hosted:
            ahead = schedule.ahead
            in_lanes = lane_steps(plan, steps_of_row, row.ranks[0], ahead=ahead)
            used = accesses(plan, steps_of_row, ahead=ahead)
            race = find_race(in_lanes, joins(in_lanes), used)
            assert race is None, f"rank {row.ranks[0]}: {race}"


def _name(plan: Plan, stage: Stage) -> str:
    return (
        str(stage.module)
        if plan.modules[stage.module].num_stages == 1
        else ".".join(map(str, stage))
    )


def _error(
    schedule: Schedule,
    ranks: Sequence[int],
    rest: str,
    *,
    at: Task | None = None,
    faults: Collection[tuple[int, Task]] = (),
) -> ScheduleError:
    """Error about some ranks; in its table a task of the first of them, or several, are marked."""
    marked = {(ranks[0], at)} if at is not None else faults
    table = draw(schedule, ranks=ranks, faults=marked)
    return ScheduleError(f"schedule.ranks[{ranks[0]}]: {rest}", table=table)
