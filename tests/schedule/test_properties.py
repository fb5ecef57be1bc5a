import math
from collections import defaultdict
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from megatron_mosaic.schedule.build import build_schedule
from megatron_mosaic.schedule.steps import (
    Compute,
    Post,
    Wait,
    communicators,
    edges_of,
    participants,
    steps_of,
)
from megatron_mosaic.schedule.verify import ScheduleError, verify
from tests.schedule.plans import place, plan_of

TRAINABLE = st.sampled_from([None, None, (), ("projector",)])
EDGES = {
    "language": (),
    "vision": (("vision", "language"),),
    "parallel": (("audio", "language"), ("vision", "language")),
    "chain": (("audio", "vision"), ("vision", "language")),
}


@st.composite
def sizes(draw, num_ranks, *, max_stages):
    """Parallel sizes whose product fits the ranks; no axis has the first choice always."""
    found = {}
    for axis in draw(st.permutations(["tp", "cp", "dp", "pp"])):
        most = min(num_ranks, max_stages) if axis == "pp" else num_ranks
        found[axis] = draw(st.integers(1, most))
        num_ranks //= found[axis]
    return found


@st.composite
def placements(draw, name, pool, *, max_stages):
    grid = draw(sizes(len(pool), max_stages=max_stages))
    ranks = draw(st.permutations(pool))[: math.prod(grid.values())]
    experts = draw(expert_sizes(grid)) if name == "language" else {}
    return place(name, *ranks, **grid, **experts, trainable=draw(TRAINABLE))


@st.composite
def expert_sizes(draw, grid):
    """Sizes that divide a stage; mostly none, as in a dense model."""
    stage = grid["tp"] * grid["cp"] * grid["dp"]
    expt_tp = draw(st.just(grid["tp"]) | st.sampled_from(_divisors(stage)))
    ep = draw(st.just(1) | st.sampled_from(_divisors(stage // expt_tp)))
    return {"expt_tp": expt_tp, "ep": ep}


def _divisors(number):
    return [size for size in range(1, number + 1) if number % size == 0]


@st.composite
def plans(draw, *, kinds=("no_pipelining", "1f1b", "colocated")):
    kind = draw(st.sampled_from(kinds))
    graphs = sorted(EDGES) if kind != "colocated" else sorted(set(EDGES) - {"language"})
    edges = EDGES[draw(st.sampled_from(graphs))]
    world = list(range(draw(st.integers(2 if edges and kind == "1f1b" else 1, 8))))
    cut = draw(st.integers(1, len(world) - 1)) if edges and kind == "1f1b" else 0
    max_stages = 1 if kind == "no_pipelining" else 4
    modules = [draw(placements("language", world[cut:], max_stages=max_stages))]
    for name in sorted({name for edge in edges for name in edge} - {"language"}):
        pool = world[:cut] or world
        modules.append(draw(placements(name, pool, max_stages=min(max_stages, 2))))
    assume(any(module.trainable != () for module in modules))
    num_microbatches = draw(st.integers(1, 12))
    divisors = [n for n in range(1, num_microbatches + 1) if num_microbatches % n == 0]
    group = draw(st.sampled_from([None, *divisors])) if kind == "colocated" else None
    return plan_of(
        kind,
        *modules,
        num_microbatches=num_microbatches,
        group=group,
        edges=edges,
        world_size=len(world),
    )


def with_rank(schedule, rank, tasks):
    rows = list(schedule.tasks)
    rows[rank] = tuple(tasks)
    return replace(schedule, tasks=tuple(rows))


def swapped(tasks, i, j):
    tasks = list(tasks)
    tasks[i], tasks[j] = tasks[j], tasks[i]
    return tasks


def runs_to_its_end(plan, schedule):
    """Plays all ranks with a queue for each rank and communicator, and nothing clever."""
    steps = [list(steps_of(plan, schedule, rank)) for rank in range(plan.world_size)]
    queues = defaultdict(list)
    done = set()
    moved = True
    while moved:
        moved = False
        for rank, left in enumerate(steps):
            while left and _passes(plan, steps, done, queues, rank):
                left.pop(0)
                moved = True
    return not any(steps)


def _passes(plan, steps, done, queues, rank):
    match steps[rank][0]:
        case Post(transfer):
            members = _members(plan, transfer.edge, rank)
            queues[rank, transfer[:2]].append(transfer.microbatch)
            heads = [queues[member, transfer[:2]][:1] for member in members]
            while heads[0] and all(head == heads[0] for head in heads):
                done.add((members, *transfer[:2], heads[0][0]))
                for member in members:
                    queues[member, transfer[:2]].pop(0)
                heads = [queues[member, transfer[:2]][:1] for member in members]
            return True
        case Wait(transfer):
            return (_members(plan, transfer.edge, rank), *transfer) in done
        case Compute(task) as step:
            groups = plan.modules[task.module].task_groups()
            group = next(members for members in groups if rank in members)
            for member in group:
                # A member that has left the meeting was there together with the others.
                if (group, task) not in done and steps[member][:1] != [step]:
                    return False
            done.add((group, task))
            return True


def _members(plan, edge, rank):
    return next(members for members in communicators(plan, edge) if rank in members)


@settings(max_examples=150, deadline=None)
@given(plans(), st.integers(1, 12), st.booleans())
def test_every_legal_plan_gets_a_schedule_that_verifies(plan, num_microbatches, forward_only):
    verify(plan, build_schedule(plan))
    other = build_schedule(plan, num_microbatches=num_microbatches, forward_only=forward_only)
    verify(plan, other)


@settings(max_examples=60, deadline=None)
@given(plans())
def test_every_schedule_runs_with_one_queue_for_each_communicator(plan):
    assert runs_to_its_end(plan, build_schedule(plan))


@settings(max_examples=60, deadline=None)
@given(plans(), st.data())
def test_verify_notices_a_dropped_task(plan, data):
    schedule = build_schedule(plan)
    rank = data.draw(st.sampled_from([r for r, tasks in enumerate(schedule.tasks) if tasks]))
    dropped = data.draw(st.integers(0, len(schedule.tasks[rank]) - 1))
    kept = [task for i, task in enumerate(schedule.tasks[rank]) if i != dropped]

    with pytest.raises(
        ScheduleError, match=r"must (run once, not 0 times|hold each of the|be a t)"
    ):
        verify(plan, with_rank(schedule, rank, kept))


@settings(max_examples=60, deadline=None)
@given(plans(), st.data())
def test_verify_notices_forward_and_backward_exchanged(plan, data):
    schedule = build_schedule(plan)
    pairs = [
        (rank, i, tasks.index(task._replace(kind="B")))
        for rank, tasks in enumerate(schedule.tasks)
        for i, task in enumerate(tasks)
        if task.kind == "F" and task._replace(kind="B") in tasks
    ]
    rank, i, j = data.draw(st.sampled_from(pairs))

    with pytest.raises(ScheduleError, match=r"must come after"):
        verify(plan, with_rank(schedule, rank, swapped(schedule.tasks[rank], i, j)))


@settings(max_examples=60, deadline=None)
@given(plans(kinds=("1f1b", "colocated")), st.data())
def test_verify_notices_two_transfers_exchanged_on_one_rank(plan, data):
    schedule = build_schedule(plan)
    pairs = [
        (rank, i, j)
        for edge in edges_of(plan)
        for rank in participants(plan, edge)[0]
        if len(_members(plan, edge, rank)) > 1
        for i, j in pairwise(
            i
            for i, task in enumerate(schedule.tasks[rank])
            if task[:3] == ("F", edge.source, edge.source_stage)
        )
    ]
    assume(pairs)
    rank, i, j = data.draw(st.sampled_from(pairs))

    with pytest.raises(ScheduleError, match=r"must come after"):
        verify(plan, with_rank(schedule, rank, swapped(schedule.tasks[rank], i, j)))


@settings(max_examples=150, deadline=None)
@given(plans(kinds=("colocated",)), st.data())
def test_verify_and_queues_agree_on_a_moved_encoder_task(plan, data):
    schedule = build_schedule(plan)
    rank = data.draw(st.sampled_from(plan.modules["vision"].ranks))
    tasks = list(schedule.tasks[rank])
    moves = [i for i, task in enumerate(tasks) if task.module == "vision"]
    task = tasks.pop(data.draw(st.sampled_from(moves)))
    tasks.insert(data.draw(st.integers(0, len(tasks))), task)
    changed = with_rank(schedule, rank, tasks)

    verdict = ""
    try:
        verify(plan, changed)
    except ScheduleError as error:
        verdict = str(error)

    # Too many live groups, or B before F without a wait between, is no deadlock.
    if "must come after" not in verdict or "as on rank" in verdict:
        stuck = "in a circle" in verdict or "as on rank" in verdict
        assert runs_to_its_end(plan, changed) != stuck
