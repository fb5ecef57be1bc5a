import pytest

from megatron_mosaic.schedule.build import build_schedule
from megatron_mosaic.schedule.steps import (
    Compute,
    Edge,
    Post,
    communicators,
    edges_of,
    participants,
    steps_of,
)
from tests.schedule.plans import place, plan_of

BOUNDARY = Edge("vision", 0, "language", 0)
PIPELINE = Edge("language", 0, "language", 1)


def shown(plan, rank, **how):
    """Steps in short: v is the boundary from vision, l the edge between language stages."""
    texts = []
    for step in steps_of(plan, build_schedule(plan, **how), rank):
        if isinstance(step, Compute):
            texts.append(str(step.task).replace(" ", ":"))
        else:
            kind, edge, microbatch = step.transfer
            name = "post" if isinstance(step, Post) else "wait"
            texts.append(f"{name}-{kind[:3]}-{edge.source[0]}{microbatch}")
    return " ".join(texts)


def test_steps_of_disjoint_ranks_post_receives_directly_before_the_wait():
    plan = plan_of("1f1b", place("vision", 0), place("language", 1), num_microbatches=1)

    assert shown(plan, 0) == "F0:vision.0 post-act-v0 post-gra-v0 wait-gra-v0 B0:vision.0"
    assert shown(plan, 1) == "post-act-v0 wait-act-v0 F0:language.0 B0:language.0 post-gra-v0"


def test_steps_of_a_rank_with_both_ends_post_once_after_the_producer():
    plan = plan_of("colocated", place("vision", 0), place("language", 0), num_microbatches=2)

    assert shown(plan, 0) == (
        "F0-1:vision.0 post-act-v0 post-act-v1 "
        "wait-act-v0 F0:language.0 B0:language.0 post-gra-v0 "
        "wait-act-v1 F1:language.0 B1:language.0 post-gra-v1 "
        "wait-gra-v0 wait-gra-v1 B0-1:vision.0"
    )


def test_steps_of_a_later_stage_that_hosts_the_encoder_receive_its_gradient_late():
    plan = plan_of(
        "colocated",
        place("vision", 0, 1, dp=2),
        place("language", 0, 1, pp=2),
        num_microbatches=1,
    )

    # Rank 1 is no destination of the boundary, which ends at the first language stage.
    assert shown(plan, 1) == (
        "F0:vision.0 post-act-v0 "
        "post-act-l0 wait-act-l0 F0:language.1 "
        "B0:language.1 post-gra-l0 "
        "post-gra-v0 wait-gra-v0 B0:vision.0"
    )


def test_steps_of_a_middle_stage_pass_both_ways():
    plan = plan_of("1f1b", place("language", 0, 1, 2, pp=3), num_microbatches=1)
    schedule = build_schedule(plan)
    posted = [s.transfer.edge for s in steps_of(plan, schedule, 1) if isinstance(s, Post)]

    # In from 0, out to 2, gradient in from 2, gradient out to 0.
    before, behind = Edge("language", 0, "language", 1), Edge("language", 1, "language", 2)
    assert posted == [before, behind, behind, before]


def test_steps_send_no_gradient_to_a_frozen_encoder():
    plan = plan_of(
        "1f1b", place("vision", 0, trainable=()), place("language", 1), num_microbatches=1
    )

    assert shown(plan, 0) == "F0:vision.0 post-act-v0"
    assert shown(plan, 1) == "post-act-v0 wait-act-v0 F0:language.0 B0:language.0"


def test_steps_forward_only_move_activations_alone():
    plan = plan_of("1f1b", place("vision", 0), place("language", 1), num_microbatches=1)

    assert shown(plan, 0, forward_only=True) == "F0:vision.0 post-act-v0"
    assert shown(plan, 1, forward_only=True) == "post-act-v0 wait-act-v0 F0:language.0"


def test_edges_join_modules_then_stages():
    plan = plan_of(
        "1f1b", place("vision", 4, 5, pp=2), place("language", 0, 1, pp=2), num_microbatches=1
    )

    assert edges_of(plan) == (
        Edge("vision", 1, "language", 0),
        Edge("language", 0, "language", 1),
        Edge("vision", 0, "vision", 1),
    )


@pytest.mark.parametrize(
    ("edge", "sides", "together"),
    [
        # All ranks of vision with those of the first language stage.
        (BOUNDARY, ((3, 1), (0, 2)), ((0, 1, 2, 3),)),
        # Each data-parallel replica has its own line.
        (PIPELINE, ((0, 2), (1, 3)), ((0, 1), (2, 3))),
    ],
)
def test_communicators_join_modules_and_keep_pipeline_lines_apart(edge, sides, together):
    plan = plan_of(
        "colocated",
        place("vision", 3, 1, dp=2),
        place("language", 0, 2, 1, 3, dp=2, pp=2),
        num_microbatches=1,
    )

    assert participants(plan, edge) == sides
    assert communicators(plan, edge) == together


def ahead_on_shared_ranks():
    return plan_of(
        "bubble_fill",
        place("vision", 0, 1, dp=2, trainable=()),
        place("language", 0, 1, pp=2),
        num_microbatches=2,
        group=2,
        ahead=True,
    )


def test_steps_of_a_rank_that_uses_what_ran_ahead_send_it_before_they_wait():
    assert shown(ahead_on_shared_ranks(), 0) == (
        "post-act-v0 wait-act-v0 F0:language.0 post-act-l0 "
        "post-act-v1 wait-act-v1 F1:language.0 post-act-l1 F0-1:vision.0 "
        "post-gra-l0 wait-gra-l0 B0:language.0 post-gra-l1 wait-gra-l1 B1:language.0"
    )


def test_steps_of_a_rank_that_only_sends_what_ran_ahead_begin_with_it():
    assert shown(ahead_on_shared_ranks(), 1) == (
        "post-act-v0 post-act-v1 F0-1:vision.0 "
        "post-act-l0 wait-act-l0 F0:language.1 B0:language.1 post-gra-l0 "
        "post-act-l1 wait-act-l1 F1:language.1 B1:language.1 post-gra-l1"
    )


def test_steps_of_evaluation_run_nothing_ahead():
    assert build_schedule(ahead_on_shared_ranks(), forward_only=True).ahead == frozenset()


def test_steps_post_the_receive_of_an_encoders_gradient_early_with_bubble_fill():
    plan = plan_of(
        "bubble_fill",
        place("vision", 0, 1, dp=2),
        place("language", 0, 1, pp=2),
        num_microbatches=1,
    )

    # Rank 0 sends the gradient as well, so it posts when it has it.
    assert shown(plan, 0).endswith("B0:language.0 post-gra-v0 wait-gra-v0 B0:vision.0")
    assert shown(plan, 1) == (
        "F0:vision.0 post-act-v0 post-gra-v0 "
        "post-act-l0 wait-act-l0 F0:language.1 B0:language.1 post-gra-l0 "
        "wait-gra-v0 B0:vision.0"
    )
