import pytest

from megatron_mosaic.schedule.build import build_schedule
from megatron_mosaic.schedule.drawing import draw
from megatron_mosaic.schedule.interleaved import language_order
from megatron_mosaic.schedule.verify import verify
from tests.schedule.plans import place, plan_of


def cells(schedule, rank):
    return " ".join(
        f"{'' if task.module == 'language' else task.module[0]}{str(task).split()[0]}.{task.stage}"
        for task in schedule.tasks[rank]
    )


def language(pp, vpp, num_microbatches):
    return plan_of(
        "interleaved",
        place("language", *range(pp), pp=pp, vpp=vpp),
        num_microbatches=num_microbatches,
    )


def test_interleaved_of_two_ranks_with_two_stages_each():
    schedule = build_schedule(language(2, 2, 4))

    # Warm-up of rank p: 2 (2 - 1 - p) + (2 - 1) 2 tasks, so 4 and 2.
    assert [cells(schedule, rank) for rank in range(2)] == [
        "F0.0 F1.0 F0.2 F1.2 F2.0 B0.2 F3.0 B1.2 F2.2 B0.0 F3.2 B1.0 B2.2 B3.2 B2.0 B3.0",
        "F0.1 F1.1 F0.3 B0.3 F1.3 B1.3 F2.1 B0.1 F3.1 B1.1 F2.3 B2.3 F3.3 B3.3 B2.1 B3.1",
    ]


def test_interleaved_of_three_ranks_with_three_stages_each():
    schedule = build_schedule(language(3, 3, 3))

    # Warm-up: 2 (3 - 1 - p) + (3 - 1) 3 tasks, so 10 but for nine there are, 8 and 6.
    assert [cells(schedule, rank) for rank in range(3)] == [
        "F0.0 F1.0 F2.0 F0.3 F1.3 F2.3 F0.6 F1.6 F2.6 B0.6 B1.6 B2.6 B0.3 B1.3 B2.3 B0.0 B1.0 B2.0",
        "F0.1 F1.1 F2.1 F0.4 F1.4 F2.4 F0.7 F1.7 F2.7 B0.7 B1.7 B2.7 B0.4 B1.4 B2.4 B0.1 B1.1 B2.1",
        "F0.2 F1.2 F2.2 F0.5 F1.5 F2.5 F0.8 B0.8 F1.8 B1.8 F2.8 B2.8 B0.5 B1.5 B2.5 B0.2 B1.2 B2.2",
    ]


@pytest.mark.parametrize("pp", [2, 3, 4])
@pytest.mark.parametrize("vpp", [2, 3])
@pytest.mark.parametrize("rounds", [1, 2, 5])
def test_interleaved_is_megatrons_order(pp, vpp, rounds):
    plan = language(pp, vpp, rounds * pp)
    schedule = build_schedule(plan)
    verify(plan, schedule)

    # Megatron-LM 0.19 numbers a rank's tasks: the k-th forward one is of chunk k // pp % vpp, the
    # k-th backward one of the mirrored chunk, both of microbatch k // (pp vpp) pp + k % pp.
    total = rounds * pp * vpp
    for rank in range(pp):
        warm_up = min(2 * (pp - rank - 1) + (vpp - 1) * pp, total)
        order = [("F", k) for k in range(warm_up)]
        for k in range(total - warm_up):
            order += [("F", warm_up + k), ("B", k)]
        order += [("B", k) for k in range(total - warm_up, total)]
        expected = []
        for kind, k in order:
            chunk = k // pp % vpp if kind == "F" else vpp - 1 - k // pp % vpp
            expected.append(f"{kind}{k // (pp * vpp) * pp + k % pp}.{chunk * pp + rank}")
        assert cells(schedule, rank) == " ".join(expected)


def test_interleaved_encoder_runs_when_the_language_model_needs_it():
    plan = plan_of(
        "interleaved",
        place("vision", 2),
        place("language", 0, 1, pp=2, vpp=2),
        num_microbatches=6,
    )
    schedule = build_schedule(plan)
    verify(plan, schedule)

    # The first language stage starts microbatches 0-3 before it ends microbatch 0. The encoder is
    # a place before it, so it starts one more; then it takes turns.
    assert cells(schedule, 2) == (
        "vF0.0 vF1.0 vF2.0 vF3.0 vF4.0 vB0.0 vF5.0 vB1.0 vB2.0 vB3.0 vB4.0 vB5.0"
    )


def test_interleaved_language_that_feeds_several_stages_does_not_wait_for_ever():
    plan = plan_of(
        "interleaved",
        place("language", *range(8), pp=8, vpp=2),
        place("out", 8, 9, pp=2),
        edges=(("language", "out"),),
        num_microbatches=16,
    )

    # The ninth microbatch comes a whole turn of eight after the eighth: the first output stage
    # must give the gradient of the eighth back before.
    verify(plan, build_schedule(plan))


def test_interleaved_frozen_encoder_has_no_backward_tasks():
    plan = plan_of(
        "interleaved",
        place("vision", 2, trainable=()),
        place("language", 0, 1, pp=2, vpp=2),
        num_microbatches=2,
    )

    assert cells(build_schedule(plan), 2) == "vF0.0 vF1.0"


def test_interleaved_warms_up_longer_for_stages_behind_the_language_model():
    plan = plan_of(
        "interleaved",
        place("language", 0, 1, pp=2, vpp=2),
        place("out", 2),
        edges=(("language", "out"),),
        num_microbatches=4,
    )
    schedule = build_schedule(plan)
    verify(plan, schedule)

    # Rank 1 has one stage behind it: 2 * 1 + (2 - 1) 2 warm-up tasks.
    assert cells(schedule, 1).startswith("F0.1 F1.1 F0.3 F1.3 F2.1 B0.3 F3.1 B1.3")
    assert cells(schedule, 2) == "oF0.0 oB0.0 oF1.0 oB1.0 oF2.0 oB2.0 oF3.0 oB3.0"


@pytest.mark.parametrize("num_microbatches", [1, 3, 5])
def test_interleaved_takes_microbatches_that_fill_no_round(num_microbatches):
    plan = language(2, 2, 4)

    verify(plan, build_schedule(plan, num_microbatches=num_microbatches))
    verify(plan, build_schedule(plan, num_microbatches=num_microbatches, forward_only=True))


def test_drawing_names_the_stage_where_a_rank_has_several():
    assert draw(build_schedule(language(2, 2, 2)), ranks=[1]) == (
        "2 microbatches\nrank 1  language.1,3  F0.1 F1.1 F0.3 B0.3 F1.3 B1.3 B0.1 B1.1"
    )


@pytest.mark.parametrize("lead", [1, 2])
@pytest.mark.parametrize("vpp", [2, 3])
def test_two_stages_behind_interleaved_stages_wait_for_no_later_round(vpp, lead):
    plan = plan_of(
        "interleaved",
        place("language", 0, 1, pp=2, vpp=vpp),
        place("talker", 2),
        place("vocoder", 3),
        edges=(("language", "talker"), ("talker", "vocoder")),
        num_microbatches=4,
    )

    # With three stages each F2 of talker, of the second round, used to come before its B1, which
    # the last language stage needs before it runs F2.
    times = language_order(plan, num_microbatches=4, lead=lead)
    talker = sorted((task for task in times if task.module == "talker"), key=lambda t: times[t])
    assert " ".join(f"{t.kind}{t.microbatches[0]}" for t in talker) == "F0 F1 B0 B1 F2 F3 B2 B3"
