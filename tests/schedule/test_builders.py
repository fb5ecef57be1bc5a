from dataclasses import replace

import pytest

from megatron_mosaic.errors import PlanError
from megatron_mosaic.schedule.build import build_schedule, max_live
from megatron_mosaic.schedule.colocated import encoder_groups
from megatron_mosaic.schedule.graph import Stage
from megatron_mosaic.schedule.schedule import peak_live
from megatron_mosaic.schedule.verify import verify
from tests.schedule.plans import place, plan_of, table


def warm_up_one_f_one_b(stage, *, num_stages, num_microbatches):
    # The textbook's construction: warm-up, steady state, cool-down.
    warm_up = min(num_stages - 1 - stage, num_microbatches)
    cells = [f"F{m}" for m in range(warm_up)]
    for m in range(warm_up, num_microbatches):
        cells += [f"F{m}", f"B{m - warm_up}"]
    return " ".join(cells + [f"B{m}" for m in range(num_microbatches - warm_up, num_microbatches)])


def test_no_pipelining_runs_one_microbatch_after_the_other():
    plan = plan_of(
        "no_pipelining", place("vision", 0, 1, dp=2), place("language", 0), num_microbatches=2
    )

    assert table(build_schedule(plan)) == [
        "vF0 F0 B0 vB0 vF1 F1 B1 vB1",
        "vF0 vB0 vF1 vB1",
    ]


def test_no_pipelining_on_equal_ranks_gives_replicas_equal_lists():
    plan = plan_of(
        "no_pipelining",
        place("vision", 0, 1, dp=2),
        place("language", 1, 0, tp=2),
        num_microbatches=1,
    )

    assert table(build_schedule(plan)) == ["vF0 F0 B0 vB0", "vF0 F0 B0 vB0"]


def test_no_pipelining_runs_encoders_in_the_order_of_the_data():
    plan = plan_of(
        "no_pipelining",
        place("vision", 0),
        place("adapter", 0),
        place("language", 0),
        edges=(("vision", "adapter"), ("adapter", "language")),
        num_microbatches=1,
    )

    assert table(build_schedule(plan)) == ["vF0 aF0 F0 B0 aB0 vB0"]


def test_one_f_one_b_joins_the_stages_of_all_modules():
    plan = plan_of(
        "1f1b",
        place("vision", 0, 1, pp=2),
        place("audio", 2),
        place("language", 3, 4, pp=2),
        num_microbatches=4,
    )

    # Stages behind: 3, 2, 2, 1, 0; so many microbatches warm up.
    assert table(build_schedule(plan)) == [
        "vF0 vF1 vF2 vF3 vB0 vB1 vB2 vB3",
        "vF0 vF1 vF2 vB0 vF3 vB1 vB2 vB3",
        "aF0 aF1 aF2 aB0 aF3 aB1 aB2 aB3",
        "F0 F1 B0 F2 B1 F3 B2 B3",
        "F0 B0 F1 B1 F2 B2 F3 B3",
    ]


@pytest.mark.parametrize("num_stages", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("num_microbatches", [1, 2, 5, 12])
def test_one_f_one_b_of_one_module_is_the_textbook_schedule(num_stages, num_microbatches):
    plan = plan_of(
        "1f1b",
        place("language", *range(num_stages), pp=num_stages),
        num_microbatches=num_microbatches,
    )

    assert table(build_schedule(plan)) == [
        warm_up_one_f_one_b(stage, num_stages=num_stages, num_microbatches=num_microbatches)
        for stage in range(num_stages)
    ]


def test_one_f_one_b_warms_up_with_no_more_than_all_microbatches():
    plan = plan_of("1f1b", place("vision", 0), place("language", 1, 2, 3, pp=3), num_microbatches=2)

    assert table(build_schedule(plan))[0] == "vF0 vF1 vB0 vB1"


def test_colocated_with_one_stage_runs_groups_around_the_language_model():
    plan = plan_of(
        "colocated",
        place("vision", 0, 1, dp=2),
        place("language", 0, 1, tp=2),
        num_microbatches=4,
        group=2,
    )

    assert table(build_schedule(plan)) == ["vF0-1 F0 B0 F1 B1 vB0-1 vF2-3 F2 B2 F3 B3 vB2-3"] * 2


def test_colocated_with_two_stages_puts_encoder_tasks_at_one_time_on_both():
    plan = plan_of(
        "colocated",
        place("vision", 0, 1, dp=2),
        place("language", 0, 1, pp=2),
        num_microbatches=4,
        group=2,
    )

    assert table(build_schedule(plan)) == [
        "vF0-1 F0 F1 B0 vF2-3 F2 B1 vB0-1 F3 B2 B3 vB2-3",
        "vF0-1 F0 B0 F1 vF2-3 B1 F2 B2 vB0-1 F3 B3 vB2-3",
    ]


def test_colocated_with_groups_of_one_frees_a_group_before_it_starts_the_next():
    plan = plan_of(
        "colocated",
        place("vision", 0, 1, tp=2),
        place("language", 0, 1, pp=2),
        num_microbatches=3,
        group=1,
    )

    assert table(build_schedule(plan)) == [
        "vF0 F0 vF1 F1 B0 vB0 vF2 F2 B1 vB1 B2 vB2",
        "vF0 F0 B0 vF1 F1 B1 vB0 vF2 F2 B2 vB1 vB2",
    ]


def test_colocated_without_group_is_the_three_phase_schedule():
    plan = plan_of(
        "colocated", place("vision", 0, 1, dp=2), place("language", 0, 1, pp=2), num_microbatches=3
    )

    assert table(build_schedule(plan)) == [
        "vF0-2 F0 F1 B0 F2 B1 B2 vB0-2",
        "vF0-2 F0 B0 F1 B1 F2 B2 vB0-2",
    ]


def test_colocated_on_disjoint_ranks_looks_one_group_ahead():
    plan = plan_of(
        "colocated", place("vision", 2), place("language", 0, 1, tp=2), num_microbatches=6, group=2
    )

    assert table(build_schedule(plan)) == [
        "F0 B0 F1 B1 F2 B2 F3 B3 F4 B4 F5 B5",
        "F0 B0 F1 B1 F2 B2 F3 B3 F4 B4 F5 B5",
        "vF0-1 vF2-3 vB0-1 vF4-5 vB2-3 vB4-5",
    ]


def test_colocated_with_groups_of_one_on_disjoint_ranks_is_one_f_one_b():
    placements = place("vision", 3), place("language", 0, 1, 2, pp=3)
    grouped = plan_of("colocated", *placements, num_microbatches=6, group=1)
    pipelined = plan_of("1f1b", *placements, num_microbatches=6)

    assert build_schedule(grouped) == build_schedule(pipelined)


def test_colocated_on_partly_shared_ranks_keeps_the_encoder_order_on_all():
    plan = plan_of(
        "colocated",
        place("vision", 1, 2, tp=2),
        place("language", 0, 1, pp=2),
        num_microbatches=4,
        group=2,
    )

    assert table(build_schedule(plan)) == [
        "F0 F1 B0 F2 B1 F3 B2 B3",
        "vF0-1 F0 B0 F1 vF2-3 B1 F2 B2 vB0-1 F3 B3 vB2-3",
        "vF0-1 vF2-3 vB0-1 vB2-3",
    ]


def test_colocated_chain_waits_for_its_shared_encoder():
    plan = plan_of(
        "colocated",
        place("vision", 0),
        place("adapter", 1),
        place("language", 0),
        edges=(("vision", "adapter"), ("adapter", "language")),
        num_microbatches=2,
        group=1,
    )

    # The adapter has ranks of its own, but cannot run ahead of the vision model that feeds it.
    assert table(build_schedule(plan)) == [
        "vF0 F0 B0 vB0 vF1 F1 B1 vB1",
        "aF0 aB0 aF1 aB1",
    ]


def test_build_caps_groups_and_shortens_the_last_for_other_counts():
    plan = plan_of(
        "colocated", place("vision", 0), place("language", 0), num_microbatches=8, group=4
    )

    assert encoder_groups(plan, num_microbatches=3) == [(0, 1, 2)]
    assert encoder_groups(plan, num_microbatches=6) == [(0, 1, 2, 3), (4, 5)]


@pytest.mark.parametrize(
    ("kind", "vision", "language", "expected"),
    [
        ("no_pipelining", (0,), (0,), ["vF0 F0 vF1 F1"]),
        ("1f1b", (0,), (1,), ["vF0 vF1", "F0 F1"]),
        ("colocated", (0,), (0,), ["vF0-1 F0 F1"]),
    ],
)
def test_forward_only_leaves_the_backward_tasks_out(kind, vision, language, expected):
    plan = plan_of(kind, place("vision", *vision), place("language", *language), num_microbatches=2)

    assert table(build_schedule(plan, forward_only=True)) == expected


def test_forward_only_colocated_starts_groups_along_the_shorter_pipeline():
    plan = plan_of(
        "colocated",
        place("vision", 0, 1, 2, dp=3),
        place("language", 0, 1, 2, pp=3),
        num_microbatches=4,
        group=2,
    )

    # Without backward passes stage s is s microbatches behind when stage 0 reaches a group.
    assert table(build_schedule(plan, forward_only=True)) == [
        "vF0-1 F0 F1 vF2-3 F2 F3",
        "vF0-1 F0 vF2-3 F1 F2 F3",
        "vF0-1 vF2-3 F0 F1 F2 F3",
    ]


@pytest.mark.parametrize(
    ("kind", "vision", "expected"),
    [
        ("no_pipelining", 0, ["vF0 F0 B0 vF1 F1 B1"]),
        ("1f1b", 1, ["F0 B0 F1 B1", "vF0 vF1"]),
        ("colocated", 0, ["vF0-1 F0 B0 F1 B1"]),
    ],
)
def test_frozen_encoder_has_no_backward_tasks(kind, vision, expected):
    plan = plan_of(
        kind, place("vision", vision, trainable=()), place("language", 0), num_microbatches=2
    )

    assert table(build_schedule(plan)) == expected


def test_frozen_language_passes_the_gradient_to_a_trainable_encoder():
    plan = plan_of(
        "no_pipelining", place("vision", 0), place("language", 0, trainable=()), num_microbatches=1
    )

    assert table(build_schedule(plan)) == ["vF0 F0 B0 vB0"]


def test_build_gives_idle_ranks_no_tasks():
    plan = plan_of("1f1b", place("language", 1), num_microbatches=1, world_size=3)

    assert table(build_schedule(plan)) == ["", "F0 B0", ""]


def test_build_rejects_a_step_without_microbatch():
    plan = plan_of("1f1b", place("language", 0), num_microbatches=1)

    with pytest.raises(PlanError, match=r"^schedule: num_microbatches=0 must be >= 1; give"):
        build_schedule(plan, num_microbatches=0)


@pytest.mark.parametrize(
    ("num_stages", "group", "shared", "expected"),
    [
        (1, 1, True, 1),
        (1, 4, True, 1),
        (2, 4, True, 2),
        (4, 1, True, 4),  # 1 + ceil(3 / 1)
        (4, 2, True, 3),  # 1 + ceil(3 / 2)
        (4, 3, True, 2),  # 1 + ceil(3 / 3)
        (4, 12, True, 1),  # there is no other group
        (1, 2, False, 2),  # one ahead
        (4, 2, False, 4),
    ],
)
def test_colocated_encoder_reaches_but_never_passes_its_live_bound(
    num_stages, group, shared, expected
):
    stages = range(num_stages)
    vision = place("vision", *stages, dp=num_stages) if shared else place("vision", num_stages)
    language = place("language", *stages, pp=num_stages)
    plan = plan_of("colocated", vision, language, num_microbatches=12, group=group)
    schedule = build_schedule(plan)
    verify(plan, schedule)

    assert max_live(plan, Stage("vision", 0), num_microbatches=12) == expected
    assert peak_live(schedule, vision.ranks[0], "vision") == expected


def test_peak_live_of_a_language_stage_counts_the_microbatches_behind_it():
    plan = plan_of("1f1b", place("language", 0, 1, 2, pp=3), num_microbatches=5)
    schedule = build_schedule(plan)

    assert [peak_live(schedule, rank, "language") for rank in range(3)] == [3, 2, 1]


def test_peak_live_without_backward_is_the_running_task():
    plan = plan_of("1f1b", place("language", 0), num_microbatches=5)

    assert peak_live(build_schedule(plan, forward_only=True), 0, "language") == 1


def test_digest_tells_orders_of_tasks_apart():
    placed = (place("vision", 0, 1, dp=2), place("language", 0, 1, pp=2))
    plan = plan_of("colocated", *placed, num_microbatches=4, group=2)
    same, built = build_schedule(plan), build_schedule(plan)
    first, *others = built.tasks
    swapped = replace(built, tasks=((first[1], first[0], *first[2:]), *others))

    assert same.digest() == built.digest()
    assert swapped.digest() != built.digest()
