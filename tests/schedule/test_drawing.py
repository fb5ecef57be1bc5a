from megatron_mosaic.schedule.build import build_schedule
from megatron_mosaic.schedule.drawing import draw
from tests.schedule.plans import place, plan_of


def test_draw_folds_equal_ranks_and_names_idle_ones():
    plan = plan_of(
        "1f1b",
        place("vision", 0, 1, 2, 4, dp=4),
        place("language", 3, 5, tp=2),
        num_microbatches=2,
        world_size=7,
    )

    assert draw(build_schedule(plan)) == (
        "2 microbatches; v = vision\n"
        "ranks [0-2, 4]  vision.0    vF0 vF1 vB0 vB1\n"
        "ranks [3, 5]    language.0  F0 B0 F1 B1\n"
        "rank 6          idle"
    )


def test_draw_shows_groups_and_both_stages_of_a_rank():
    plan = plan_of(
        "colocated", place("vision", 0), place("language", 0, 1, pp=2), num_microbatches=2
    )

    assert draw(build_schedule(plan, forward_only=True)) == (
        "2 microbatches, forward only; v = vision\n"
        "rank 0  vision.0 language.0  vF0-1 F0 F1\n"
        "rank 1  language.1           F0 F1"
    )


def test_draw_folds_the_virtual_stages_of_a_rank():
    language = place("language", 0, 1, pp=2, vpp=4)
    plan = plan_of("interleaved", language, num_microbatches=2)

    first, second = draw(build_schedule(plan, forward_only=True)).splitlines()[1:]
    assert first.startswith("rank 0  language.0,2,...,6  F0.0 F1.0 F0.2")
    assert second.startswith("rank 1  language.1,3,...,7  F0.1")


def test_draw_lengthens_prefixes_until_they_differ():
    plan = plan_of(
        "colocated",
        *(place(name, 0) for name in ("vision", "video", "audio", "language")),
        num_microbatches=1,
    )

    first, second = draw(build_schedule(plan, forward_only=True)).splitlines()
    assert first == "1 microbatch, forward only; a = audio; vid = video; vis = vision"
    assert second.endswith("  aF0 vidF0 visF0 F0")


def test_draw_draws_the_chosen_ranks_alone():
    plan = plan_of("1f1b", place("language", 0, 1, pp=2), num_microbatches=1)

    assert draw(build_schedule(plan), ranks=[1]) == "1 microbatch\nrank 1  language.1  F0 B0"


def test_draw_wraps_between_cells():
    plan = plan_of("1f1b", place("language", 0), num_microbatches=4)

    # Room for 32 - 20 = 12 columns of cells: 11 for four of them.
    assert draw(build_schedule(plan), width=32) == (
        "4 microbatches\nrank 0  language.0  F0 B0 F1 B1\n                    F2 B2 F3 B3"
    )


def test_draw_leaves_out_the_middle_of_a_long_row():
    plan = plan_of("1f1b", place("language", 0), num_microbatches=8)

    # 16 tasks in four lines of four; the middle two lines hold 8.
    assert draw(build_schedule(plan), width=32, max_lines=3) == (
        "8 microbatches\n"
        "rank 0  language.0  F0 B0 F1 B1\n"
        "                    ... 8 tasks ...\n"
        "                    F6 B6 F7 B7"
    )


def test_draw_keeps_to_the_width_with_many_scattered_ranks():
    plan = plan_of("1f1b", place("language", *range(0, 200, 2), dp=100), num_microbatches=64)

    assert max(map(len, draw(build_schedule(plan)).splitlines())) <= 100
