"""Ten thousand random plans and orders: what verify accepts runs to its end, by every judge."""

import random
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mosaic.errors import LayoutError
from megatron_mosaic.schedule.build import build_schedule
from megatron_mosaic.schedule.graph import Stage, rank_kinds, stage_order
from megatron_mosaic.schedule.program import program_of
from megatron_mosaic.schedule.rendezvous import blocked_ranks
from megatron_mosaic.schedule.simulate import PassTimes, simulate
from megatron_mosaic.schedule.steps import needs_of, steps_of
from megatron_mosaic.schedule.verify import ScheduleError, verify
from tests.schedule.plans import place, plan_of
from tests.schedule.test_properties import EDGES, runs_to_its_end

ENCODED = ("colocated", "concurrent")  # kinds that need a module beside language
KINDS = ("no_pipelining", "1f1b", "interleaved", "colocated", "bubble_fill")
SEEDS = st.integers(0, 2**32 - 1)


def some_sizes(rng, num_ranks, *, most_stages):
    sizes = {}
    for axis in rng.sample(["tp", "cp", "dp", "pp"], 4):
        sizes[axis] = rng.randint(1, min(num_ranks, most_stages) if axis == "pp" else num_ranks)
        num_ranks //= sizes[axis]
    return sizes


def some_placement(rng, name, pool, *, most_stages=3, **more):
    sizes = some_sizes(rng, len(pool), most_stages=most_stages)
    number = sizes["tp"] * sizes["cp"] * sizes["dp"] * sizes["pp"]
    trainable = rng.choice([None, None, ()])
    return place(name, *rng.sample(pool, number), **sizes, trainable=trainable, **more)


def some_plan(rng, kinds=KINDS):
    """A random small plan; drawn again while its parts contradict each other."""
    while True:
        kind = rng.choice(kinds)
        fills = kind in ("bubble_fill", "concurrent")
        beside = kind in ("1f1b", "interleaved")
        graphs = ["vision", "parallel", "chain"] + ["language"] * (kind not in ENCODED)
        edges = list(EDGES[rng.choice(graphs)])
        if rng.random() < 0.2:
            edges.append(("language", "out"))
        world = list(range(rng.randint(2 if beside and edges else 1, 5)))
        cut = rng.randint(1, len(world) - 1) if beside and edges else 0
        virtual = rng.choice([1, 2]) if kind == "interleaved" or fills else 1
        stages = 1 if kind == "no_pipelining" else 3
        try:
            modules = [
                some_placement(rng, "language", world[cut:], most_stages=stages, vpp=virtual)
            ]
            for name in sorted({name for edge in edges for name in edge} - {"language"}):
                pool = (world[:cut] if beside else world) or world
                chunks = rng.choice([1, 1, 2])
                modules.append(some_placement(rng, name, pool, most_stages=stages, vpp=chunks))
            num_microbatches = rng.randint(1, 5)
            divisors = [n for n in range(1, num_microbatches + 1) if num_microbatches % n == 0]
            grouped = kind == "colocated" or fills
            return plan_of(
                kind,
                *modules,
                num_microbatches=num_microbatches,
                group=rng.choice([None, *divisors]) if grouped else None,
                edges=tuple(edges),
                world_size=len(world),
                ahead=fills and rng.random() < 0.3,
            )
        except LayoutError:
            continue


def shuffled(rng, plan, schedule):
    """The schedule with a task moved on all ranks that host the same, once or twice."""
    rows = list(schedule.tasks)
    for _ in range(rng.randint(1, 2)):
        kind = rng.choice(rank_kinds(plan))
        tasks = list(rows[kind.ranks[0]])
        task = tasks.pop(rng.randrange(len(tasks)))
        tasks.insert(rng.randint(0, len(tasks)), task)
        for rank in kind.ranks:
            rows[rank] = tuple(tasks)
    return replace(schedule, tasks=tuple(rows))


def some_schedule(rng, plan):
    evaluation = rng.random() < 0.15
    other = rng.randint(1, 6) if rng.random() < 0.2 else None
    built = build_schedule(plan, num_microbatches=other, forward_only=evaluation)
    return built if rng.random() < 0.3 else shuffled(rng, plan, built)


def accepts(plan, schedule):
    try:
        verify(plan, schedule)
    except ScheduleError:
        return False
    return True


@settings(max_examples=10_000, deadline=None, derandomize=True, database=None)
@given(SEEDS)
def test_whatever_verify_accepts_runs_to_its_end(seed):
    rng = random.Random(seed)
    plan = some_plan(rng)
    schedule = some_schedule(rng, plan)

    if accepts(plan, schedule):
        steps = [steps_of(plan, schedule, rank) for rank in range(plan.world_size)]
        assert not blocked_ranks(plan, steps)
        assert runs_to_its_end(plan, schedule)
        times = {stage: PassTimes(1.0, 2.0) for stage in stage_order(plan)}
        timeline = simulate(program_of(plan, schedule), tasks_s=times)
        for kind in timeline.program.kinds:
            spans = list(timeline.spans(kind))
            assert tuple(span.task for span in spans) == schedule.tasks[kind.ranks[0]]
            assert all(one.end_s <= two.start_s + 1e-9 for one, two in pairwise(spans))


@settings(max_examples=500, deadline=None, derandomize=True, database=None)
@given(SEEDS)
def test_whatever_is_built_is_accepted(seed):
    rng = random.Random(seed)
    plan = some_plan(rng)

    verify(plan, build_schedule(plan))
    verify(plan, build_schedule(plan, num_microbatches=rng.randint(1, 7)))
    verify(plan, build_schedule(plan, num_microbatches=rng.randint(1, 7), forward_only=True))


def depends_on(needs, task, other):
    """Whether a task needs another's result, directly or through tasks of any rank."""
    open_ends = [(task.kind, Stage(*task[1:3]), m) for m in task.microbatches]
    wanted = {(other.kind, Stage(*other[1:3]), m) for m in other.microbatches}
    seen = set()
    while open_ends:
        key = open_ends.pop()
        if key in seen:
            continue
        seen.add(key)
        kind, stage, m = key
        open_ends += [(before, place, m) for before, place in needs[kind, stage]]
    return bool(wanted & seen)


@settings(max_examples=1_000, deadline=None, derandomize=True, database=None)
@given(SEEDS)
def test_a_dropped_dependency_is_always_caught(seed):
    rng = random.Random(seed)
    plan = some_plan(rng)
    schedule = build_schedule(plan)
    kind = rng.choice(rank_kinds(plan))
    tasks = list(schedule.tasks[kind.ranks[0]])
    needs = needs_of(plan, schedule)
    later = rng.randrange(len(tasks))
    before = [i for i in range(later) if depends_on(needs, tasks[later], tasks[i])]
    if not before:
        return

    # The task runs before one whose result it needs, perhaps by way of other ranks.
    tasks.insert(rng.choice(before), tasks.pop(later))
    rows = list(schedule.tasks)
    for rank in kind.ranks:
        rows[rank] = tuple(tasks)
    with pytest.raises(ScheduleError, match=r"must (come after|not wait in a circle)"):
        verify(plan, replace(schedule, tasks=tuple(rows)))
