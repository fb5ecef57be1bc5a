"""Lanes: literal events, and properties over random plans whose modules run at the same time."""

import random
from collections import defaultdict
from dataclasses import replace
from graphlib import TopologicalSorter
from itertools import product

from hypothesis import given, settings

from megatron_mosaic.layout.plan import Plan
from megatron_mosaic.schedule.ahead import Part, prologue_of, steps_after_prologue
from megatron_mosaic.schedule.alone import alone_tasks
from megatron_mosaic.schedule.build import build_schedule
from megatron_mosaic.schedule.drawing import draw
from megatron_mosaic.schedule.lanes import Joins, joins, lane_steps, lanes_of
from megatron_mosaic.schedule.order import write_order
from megatron_mosaic.schedule.races import accesses, find_race
from megatron_mosaic.schedule.steps import (
    Compute,
    Post,
    Transfer,
    communicators,
    edges_of,
    needs_of,
    steps_of,
)
from megatron_mosaic.schedule.verify import verify
from tests.schedule.plans import place, plan_of
from tests.schedule.test_random_schedules import SEEDS, accepts, shuffled, some_plan

PARTS = (Part(0), Part.BEGINS, Part.ENDS)


def shared(num_microbatches=1, **choice):
    """Two replicas of vision on the two ranks of the language model's pipeline."""
    return plan_of(
        "concurrent",
        place("vision", 0, 1, dp=2, trainable=() if choice.get("ahead") else None),
        place("language", 0, 1, pp=2),
        num_microbatches=num_microbatches,
        **choice,
    )


def in_lanes(plan, rank, schedule=None):
    schedule = schedule or build_schedule(plan)
    alone = alone_tasks(plan, schedule, rank)
    steps = steps_of(plan, schedule, rank)
    return lane_steps(plan, steps, rank, alone=alone, ahead=schedule.ahead)


def shown(steps):
    """A line for every step: lane, kind, what, and the steps that it waits for."""
    lines = []
    for step, lane, after, whole in steps:
        what = step[0]
        name = f"{what.kind} {what.microbatch}" if isinstance(what, Transfer) else what.kind
        waits = f" after {after[0]}" if after else ""
        lines.append(f"{lane}: {type(step).__name__} {name}{waits}{' whole' if whole else ''}")
    return lines


def test_lanes_of_a_rank_wait_only_where_one_takes_what_another_made():
    # Rank 0 runs vF0 F0 B0 vB0, each of which needs the one before.
    assert shown(in_lanes(shared(), 0)) == [
        "vision: Compute F whole",
        "vision: Post activation 0 whole",
        "language: Wait activation 0 after 1 whole",
        "language: Compute F whole",
        "language: Post activation 0 whole",
        "language: Post gradient 0 whole",
        "language: Wait gradient 0 whole",
        "language: Compute B whole",
        "language: Post gradient 0 whole",
        "vision: Wait gradient 0 after 8 whole",
        "vision: Compute B whole",
    ]
    # Rank 1 hosts the last language stage, which vision does not feed: no lane waits there.
    assert [step.after for step in in_lanes(shared(), 1)] == [()] * 10


def test_event_that_another_one_implies_is_left_out():
    # Audio feeds vision, and both feed language: its first task needs no event of audio, as vision
    # has waited for a later one.
    plan = plan_of(
        "concurrent",
        place("audio", 0),
        place("vision", 0),
        place("language", 0),
        num_microbatches=1,
        edges=(("vision", "language"), ("audio", "language"), ("audio", "vision")),
    )
    steps = in_lanes(plan, 0)

    assert draw(build_schedule(plan), ranks=[0]).endswith("aF0 vF0 F0 B0 vB0 aB0")
    # Steps 1 and 2 post what audio made, for language first; step 5 what vision made.
    assert [line for line in shown(steps)[:10] if "Wait" in line] == [
        "vision: Wait activation 0 after 2 whole",
        "language: Wait activation 0 after 5 whole",
        "language: Wait activation 0 whole",
    ]
    # Vision and language begin after audio, and have ended when its backward pass has.
    assert joins(steps) == Joins(begin=("audio",), end=("audio",))


def test_lanes_that_nothing_joins_are_joined_to_the_training_loop():
    plan = shared(num_microbatches=2, ahead=True)

    # Vision works on the next step's samples; what it made of this step's is at hand.
    assert [step.after for rank in (0, 1) for step in in_lanes(plan, rank) if step.after] == []
    assert joins(in_lanes(plan, 0)) == Joins(("vision", "language"), ("vision", "language"))


def test_ranks_of_other_schedules_have_one_lane():
    plan = plan_of("bubble_fill", place("vision", 0), place("language", 0), num_microbatches=2)

    assert lanes_of(plan, 0) == ("",)
    assert {(step.lane, step.after) for step in in_lanes(plan, 0)} == {("", ())}


def test_task_is_alone_where_the_schedule_puts_all_others_before_or_after_it():
    plan = shared(num_microbatches=4)
    schedule = build_schedule(plan)

    # Beside the first encoder task its rank has no other work, nor beside the last; but language
    # runs beside vB0 and vF3, and autograd runs vB3 where vF3 ran.
    for rank in (0, 1):
        assert alone_tasks(plan, schedule, rank) == frozenset()


def test_task_without_backward_pass_is_alone_by_itself():
    plan = plan_of(
        "concurrent",
        place("vision", 0, 1, dp=2, trainable=()),
        place("language", 0, 1, pp=2),
        num_microbatches=4,
    )

    # Beside vF0 there is nothing; beside vF1 runs F0.
    for rank in (0, 1):
        alone = alone_tasks(plan, build_schedule(plan), rank)
        assert {str(task) for task in alone if task.module == "vision"} == {"F0 vision.0"}


def test_task_of_ranks_with_one_module_is_alone():
    # Rank 1 hosts vision alone.
    plan = plan_of(
        "concurrent", place("vision", 0, 1, dp=2), place("language", 0), num_microbatches=4
    )
    schedule = build_schedule(plan)

    assert alone_tasks(plan, schedule, 1) == set(schedule.tasks[1])


def test_race_is_told_with_what_and_who():
    steps = in_lanes(shared(), 0)
    used = accesses(shared(), [step.step for step in steps])
    without = [step._replace(after=()) for step in steps]

    # Language would begin before the training loop has handed over the memory.
    assert str(find_race(without, joins(steps), used)) == (
        "lane language uses posted activation 0 of vision.0 -> language.0 "
        "without waiting for lane <main>"
    )


def some_schedule(rng):
    """A plan with lanes, a schedule of it, and one step of a rank of training or evaluation."""
    plan = some_plan(rng, ("concurrent",))
    schedule = build_schedule(
        plan,
        num_microbatches=rng.randint(1, 6) if rng.random() < 0.2 else None,
        forward_only=rng.random() < 0.2,
    )
    moved = shuffled(rng, plan, schedule)
    return plan, moved if rng.random() < 0.5 and accepts(plan, moved) else schedule


def walks(plan, schedule, rank):
    """What a rank walks at a time, where training begins, goes on and ends."""
    steps = steps_of(plan, schedule, rank)
    for part in PARTS if schedule.ahead else PARTS[:1]:
        for own in (
            prologue_of(steps, schedule, part),
            steps_after_prologue(steps, schedule, part),
        ):
            used = accesses(plan, own, ahead=schedule.ahead)
            yield lane_steps(plan, own, rank, ahead=schedule.ahead), used


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(SEEDS)
def test_lanes_have_no_race_and_each_event_prevents_one(seed):
    plan, schedule = some_schedule(random.Random(seed))

    verify(plan, schedule)
    for rank in range(plan.world_size):
        for steps, used in walks(plan, schedule, rank):
            joined = joins(steps)
            assert find_race(steps, joined, used) is None
            for position, step in enumerate(steps):
                for event in step.after:
                    left = tuple(other for other in step.after if other != event)
                    fewer = (*steps[:position], step._replace(after=left), *steps[position + 1 :])
                    assert find_race(fewer, joined, used) is not None
            for side, lanes in joined._asdict().items():
                for lane in lanes:
                    fewer = joined._replace(**{side: tuple(set(lanes) - {lane})})
                    assert find_race(steps, fewer, used) is not None


def executed(plan, steps, order):
    """What each step reads, and what is left in memory, if a rank runs its steps in an order."""
    memory = defaultdict(lambda: "main's")
    seen = {}
    for position in order:
        step, used = steps[position]
        read = {what: memory[what] for what, _ in used}
        seen[position] = read
        # Contents are told apart by who wrote them and from what; sums keep their order.
        memory |= {what: hash((step, what, *read.values())) for what, writes in used if writes}
    return seen, dict(memory)


def some_order(rng, steps):
    """A random order in which lanes with these events may run."""
    left = defaultdict(list)
    for position, step in enumerate(steps):
        left[step.lane].append(position)
    order = []
    while left:
        done = set(order)
        lane = rng.choice([n for n, own in left.items() if done.issuperset(steps[own[0]].after)])
        order.append(left[lane].pop(0))
        if not left[lane]:
            del left[lane]
    return order


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(SEEDS)
def test_every_order_that_lanes_allow_reads_and_leaves_the_same(seed):
    rng = random.Random(seed)
    plan, schedule = some_schedule(rng)

    for rank in range(plan.world_size):
        for steps, used in walks(plan, schedule, rank):
            uses = [(step.step, own) for step, own in zip(steps, used, strict=True)]
            serial = executed(plan, uses, range(len(steps)))
            assert executed(plan, uses, some_order(rng, steps)) == serial


def lanes_finish(plan, schedule):
    """Whether lanes come to their end if each waits only for its events and for other ranks'."""
    steps = {rank: in_lanes(plan, rank, schedule) for rank in range(plan.world_size)}
    left = {
        (rank, lane): [n for n, step in enumerate(own) if step.lane == lane]
        for rank, own in steps.items()
        for lane in lanes_of(plan, rank)
    }
    done = {rank: set() for rank in steps}
    posted, at = defaultdict(set), defaultdict(set)

    def passes(rank, position):
        step, _, after, _ = steps[rank][position]
        if not done[rank].issuperset(after):
            return False
        if isinstance(step, Compute):
            members = next(m for m in plan.modules[step.task.module].task_groups() if rank in m)
            at[step.task].add(rank)
            return at[step.task].issuperset(members)
        edge = step.transfer.edge
        members = next(own for own in communicators(plan, edge) if rank in own)
        if isinstance(step, Post):
            posted[step.transfer].add(rank)
        return isinstance(step, Post) or posted[step.transfer].issuperset(members)

    moved = True
    while moved:
        moved = False
        for (rank, _), own in left.items():
            while own and passes(rank, own[0]):
                done[rank].add(own.pop(0))
                moved = True
    return not any(left.values())


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(SEEDS)
def test_lanes_that_run_beside_each_other_come_to_their_end(seed):
    plan, schedule = some_schedule(random.Random(seed))

    assert lanes_finish(plan, schedule)


def reach(plan, schedule):
    """For every rank and task all that come after it, by a walk over the graph of single ranks."""
    group_of = {
        (name, rank): members
        for name, placement in plan.modules.items()
        for members in placement.task_groups()
        for rank in members
    }
    nodes = {
        (rank, task): (group_of[task.module, rank], task)
        for rank, own in enumerate(schedule.tasks)
        for task in own
    }
    after = {node: set() for node in nodes.values()}
    for rank, own in enumerate(schedule.tasks):
        for n, task in enumerate(own):
            behind = (other for other in own[n + 1 :] if other.module == task.module)
            after[nodes[rank, task]] |= {nodes[rank, other] for other in behind}
    needs = needs_of(plan, schedule)
    for (rank, task), (one, before) in product(nodes, nodes):
        is_input = (before.kind, before[1:3]) in needs[task.kind, task[1:3]]
        is_same_data = set(task.microbatches) & set(before.microbatches)
        if is_input and is_same_data and meet(plan, task, rank, before, one):
            after[nodes[one, before]].add(nodes[rank, task])
    found = {}
    for node in TopologicalSorter(after).static_order():  # those that come after it are first
        found[node] = after[node].union(*(found[other] for other in after[node]))
    return nodes, found


def meet(plan, task, rank, before, one):
    """Whether a rank that runs a task gets what another one makes in the task before."""
    edge = (task.module, *sorted((task.stage, before.stage)))
    return (
        task.module != before.module
        or rank == one
        or any(
            {rank, one} <= set(members)
            for own in edges_of(plan)
            if own.source == own.destination and (own.source, *own[1::2]) == edge
            for members in communicators(plan, own)
        )
    )


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(SEEDS)
def test_task_is_alone_if_the_graph_of_single_ranks_says_so(seed):
    plan, schedule = some_schedule(random.Random(seed))
    nodes, after = reach(plan, schedule)

    def is_alone(rank, task):
        others = [nodes[rank, t] for t in schedule.tasks[rank] if t.module != task.module]
        passes = (nodes.get((rank, task._replace(kind=kind))) for kind in "FB")
        return all(
            other in after[node] or node in after[other]
            for node in passes
            if node is not None
            for other in others
        )

    found = {rank: alone_tasks(plan, schedule, rank) for rank in range(plan.world_size)}
    for rank, task in nodes:
        ranks = plan.modules[task.module].stage_ranks(task.stage)
        # Ranks that run their tasks together have the GPU together, or share it together.
        if task in found[rank]:
            assert is_alone(rank, task)
        elif all(is_alone(other, task) for other in ranks):
            raise AssertionError(f"rank {rank}: {task}")


def test_order_of_lanes_survives_the_plan_file():
    plan = shared(num_microbatches=6, group=2)
    built = build_schedule(plan)
    stored = replace(plan, schedule=replace(plan.schedule, order=write_order(plan, built)))

    read = Plan.loads(stored.to_yaml(), "plan.yaml")

    assert dict(write_order(plan, built))["0"] == (
        "vision:F*2 F vision:F (F B F B vision:B)*2 F B*2 vision:B"
    )
    assert read == stored
    assert build_schedule(read) == built


def test_evaluation_runs_in_lanes_in_the_order_of_colocated():
    plan = shared(num_microbatches=4)
    colocated = plan_of("colocated", *plan.modules.values(), num_microbatches=4, group=1)

    for options in ({"forward_only": True}, {"num_microbatches": 3}):
        schedule = build_schedule(plan, **options)
        assert schedule == build_schedule(colocated, **options)

    # Vision's second task may run beside language's first.
    assert shown(in_lanes(shared(2), 0, build_schedule(shared(2), forward_only=True))) == [
        "vision: Compute F whole",
        "vision: Post activation 0 whole",
        "language: Wait activation 0 after 1",
        "language: Compute F",
        "language: Post activation 0",
        "vision: Compute F",
        "vision: Post activation 1",
        "language: Wait activation 1 after 6 whole",
        "language: Compute F whole",
        "language: Post activation 1 whole",
    ]


def test_evaluation_posts_in_the_lane_of_training_what_training_finds_at_hand():
    plan = shared(2, ahead=True)

    # A communicator keeps to one lane of a rank, so language posts here too: after vision.
    assert shown(in_lanes(plan, 0, build_schedule(plan, forward_only=True))) == [
        "vision: Compute F whole",
        "language: Post activation 0 after 0",
        "language: Wait activation 0",
        "language: Compute F",
        "language: Post activation 0",
        "vision: Compute F",
        "language: Post activation 1 after 5 whole",
        "language: Wait activation 1 whole",
        "language: Compute F whole",
        "language: Post activation 1 whole",
    ]
