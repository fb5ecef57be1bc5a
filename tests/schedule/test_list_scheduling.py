from functools import partial
from itertools import product
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mosaic.schedule import fill as filling
from megatron_mosaic.schedule.graph import stage_order
from megatron_mosaic.schedule.list_scheduling import (
    Work,
    best_sequence,
    pull,
    run_list,
    tails_s,
)
from megatron_mosaic.schedule.simulate import PassTimes
from tests.schedule.optimum import shortest_s
from tests.schedule.plans import place, plan_of


def replayed_s(work, tasks):
    """Makespan of tasks that start in an order, each as early as it can."""
    free, ready, ends = {}, [0.0] * len(tasks), []
    for task in tasks:
        start = max([ready[task], *(free.get(m, 0.0) for m in work.machines[task])])
        ends.append(start + work.length_s[task])
        free |= dict.fromkeys(work.machines[task], ends[-1])
        for other, lag_s in work.after[task]:
            assert other not in tasks[: tasks.index(task)]
            ready[other] = max(ready[other], ends[-1] + lag_s)
    return max(ends)


@st.composite
def works(draw):
    """Up to seven tasks on up to three machines; later ones wait for earlier ones."""
    num_tasks = draw(st.integers(1, 7))
    machines = st.sets(st.integers(0, 2), min_size=1, max_size=2).map(sorted).map(tuple)
    lag = st.sampled_from([0.0, 0.5])
    pairs = [(a, b) for b in range(num_tasks) for a in range(b)]
    joined = draw(st.lists(st.sampled_from(pairs), unique=True, max_size=8)) if pairs else []
    return Work.of(
        [draw(machines) for _ in range(num_tasks)],
        [float(draw(st.integers(0, 4))) for _ in range(num_tasks)],
        [(a, b, draw(lag)) for a, b in joined],
    )


def test_tails_are_the_longest_ways_to_the_end():
    # 0 (2 s) -> 1 (3 s), a second later; 0 -> 2 (5 s) at once.
    work = Work.of([(0,), (0,), (1,)], [2.0, 3.0, 5.0], [(0, 1, 1.0), (0, 2, 0.0)])

    assert tails_s(work) == [7.0, 3.0, 5.0]


def test_tails_of_a_circle_are_refused():
    with pytest.raises(AssertionError, match="must not wait for each other in a circle"):
        tails_s(Work.of([(0,), (0,)], [1.0, 1.0], [(0, 1, 0.0), (1, 0, 0.0)]))


def test_list_starts_the_most_urgent_ready_task():
    work = Work.of([(0,), (0,), (0,)], [1.0, 2.0, 3.0], [])

    assert run_list(work, [0.0, 2.0, 1.0]).tasks == [1, 2, 0]


def test_list_starts_a_task_of_two_machines_when_both_are_free():
    # The second task needs machine 0 too, which is busy until 2 s.
    work = Work.of([(0,), (0, 1), (1,)], [2.0, 1.0, 1.0], [])

    assert run_list(work, [9.0, 5.0, 1.0]).ends_s == [2.0, 3.0, 1.0]


def test_pulled_tasks_go_into_gaps():
    # Machine 0 waits from 1 to 3 s for machine 1; task 3 fits in there, but came last.
    work = Work.of([(0,), (1,), (0,), (0,)], [1.0, 2.0, 1.0, 2.0], [(0, 1, 0.0), (1, 2, 0.0)])
    late = run_list(work.turned(), [0.0, 0.0, 0.0, 1.0])

    assert late.makespan_s == 6.0
    assert pull(work, late).ends_s == [1.0, 3.0, 4.0, 3.0]


@settings(max_examples=150, deadline=None)
@given(works())
def test_best_sequence_is_valid_and_not_below_the_optimum(work):
    found = best_sequence(work, max_lists=6)

    assert sorted(found.tasks) == list(range(len(work.after)))
    assert replayed_s(work, found.tasks) <= found.makespan_s + 1e-9
    assert found.makespan_s >= shortest_s(work) - 1e-6
    assert found.makespan_s <= run_list(work, tails_s(work)).makespan_s


def small_work(*, vision, language, vpp=1, num_microbatches=3, max_live=None):
    """What is listed for two replicas of vision and a two-stage language model, and the order."""
    plan = plan_of(
        "bubble_fill",
        place("vision", 0, 1, dp=2, vpp=vpp),
        place("language", 0, 1, pp=2),
        num_microbatches=num_microbatches,
        max_live=max_live,
    )
    times = {"vision": PassTimes(*vision), "language": PassTimes(*language)}
    listed = []
    with patch.object(filling, "best_sequence", partial(_kept, listed)):
        filling.fill(plan, tasks_s={stage: times[stage.module] for stage in stage_order(plan)})
    return listed[0]


def _kept(listed, work, *, max_lists):
    found = best_sequence(work, max_lists=max_lists)
    listed.append((work, found))
    return found


@pytest.mark.parametrize(
    ("case", "optimum_s"),
    [
        # Three microbatches of 2 + 4 and 1 + 2 s are 27 s of work. Rank 1 waits 2 s for rank 0.
        ({"vision": (1, 2), "language": (2, 4)}, 29.0),
        ({"vision": (3, 3), "language": (2, 4)}, 36.0),
        ({"vision": (1, 2), "language": (2, 4), "vpp": 2, "num_microbatches": 2}, 26.0),
        ({"vision": (3, 5), "language": (2, 4), "num_microbatches": 4, "max_live": 2}, 62.0),
        ({"vision": (1, 2), "language": (2, 4), "vpp": 2, "max_live": 2}, 40.0),
    ],
)
def test_filled_pipelines_are_as_short_as_any_order(case, optimum_s):
    work, found = small_work(**case)

    assert shortest_s(work) == optimum_s
    assert found.makespan_s == optimum_s


def test_filled_pipelines_are_seldom_longer_than_the_optimum():
    times = [(1, 2), (4, 2), (3, 5), (5, 1)]
    gaps = []
    for vision, language, max_live in product(times, times, (None, 2)):
        work, found = small_work(vision=vision, language=language, max_live=max_live)
        gaps.append(found.makespan_s / shortest_s(work) - 1)

    # One list by urgency alone is the optimum in 16 of the 32.
    assert sum(gap < 1e-9 for gap in gaps) >= 30
    assert max(gaps) < 0.04
