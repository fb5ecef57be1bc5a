import random

import pytest

from benchmarks.step_deviation import SETTINGS, deviations, draw_step
from megatron_mosaic.cost.costs import ModuleInStep, StageCosts, StageMemory
from megatron_mosaic.cost.pipeline import Hop, PipelineStage, interleaved_s, pipeline_s
from megatron_mosaic.cost.step import step_breakdown


def stage(forward_s, backward_s, **times):
    return StageCosts(forward_s=forward_s, backward_s=backward_s, memory=StageMemory(), **times)


def module(name, *stages, **fields):
    return ModuleInStep(name=name, stages=stages, **fields)


def step(*modules, kind="1f1b", num_microbatches, group=None):
    return step_breakdown(
        {each.name: each for each in modules},
        edges=[(each.name, "language") for each in modules if each.name != "language"],
        kind=kind,
        num_microbatches=num_microbatches,
        encoder_group=group,
    )


@pytest.mark.parametrize(
    ("num_stages", "num_microbatches", "expected"),
    [(1, 8, 24.0), (4, 8, 33.0), (4, 2, 15.0), (64, 256, 957.0)],
)
def test_balanced_pipeline_takes_the_textbooks_time(num_stages, num_microbatches, expected):
    stages = [stage(1.0, 2.0)] * num_stages

    breakdown = step(module("language", *stages), num_microbatches=num_microbatches)

    # (M + P - 1) * (F + B), of which one rank works M * (F + B).
    assert breakdown.step_s == expected
    assert breakdown.compute_s == 3 * num_microbatches
    assert breakdown.bubble_s == 3 * (num_stages - 1)


def test_interleaving_divides_the_bubble_by_the_chunks():
    stages = [stage(1.0, 2.0)] * 4

    breakdown = step(module("language", *stages, chunks=3), num_microbatches=8)

    # 8 * 3 s of work, and 3 * (1 + 2) / 3 s of bubble.
    assert breakdown.step_s == pytest.approx(27.0)
    assert breakdown.bubble_s == pytest.approx(3.0)


def test_interleaved_hops_delay_the_beginning_and_the_end():
    stages = [PipelineStage(1.0, 2.0, (Hop(1, 0.25),)), PipelineStage(1.0, 2.0)]

    # 4 * 3 + 3 / 2 + 2 * 0.25
    assert interleaved_s(stages, chunks=2, num_microbatches=4) == 14.0


def test_hops_slow_every_round_between_two_stages():
    stages = [PipelineStage(1.0, 1.0, (Hop(1, 0.5),)), PipelineStage(1.0, 1.0)]

    # Two microbatches go round in F + h + F + B + h + B = 5 s and not in 4. Rank 0 runs
    # F0 F1 B0 F2 B1 F3 B2 B3; B0 ends at 4, B2 at 9, B3 with its own way down and up:
    # F3 ends at 8, arrives at 8.5, B3 there ends at 10.5, arrives at 11 and ends at 12.
    assert pipeline_s(stages, num_microbatches=4) == 12.0


def test_encoders_on_their_own_ranks_join_the_pipeline():
    breakdown = step(
        module("vision", stage(2.0, 1.0)),
        module("audio", stage(1.0, 1.0)),
        module("language", stage(1.0, 2.0)),
        num_microbatches=3,
    )

    # As drawn in tests/schedule/test_simulate.py.
    assert breakdown.step_s == 12.0
    assert breakdown.bubble_s == 3.0


def test_frozen_encoder_adds_only_its_first_forward_pass():
    breakdown = step(
        module("vision", stage(2.0, 0.0)), module("language", stage(1.0, 2.0)), num_microbatches=4
    )

    # 2 + 4 * (1 + 2)
    assert breakdown.step_s == 14.0


def test_group_on_shared_ranks_pauses_the_pipeline():
    breakdown = step(
        module("vision", stage(2.0, 2.0), shared=True),
        module("language", stage(1.0, 1.0), stage(1.0, 1.0)),
        kind="colocated",
        num_microbatches=4,
        group=2,
    )

    # As drawn in tests/schedule/test_simulate.py: 4 * 2 s of the language model, 2 * 4 s of vision.
    assert breakdown.step_s == 19.0
    assert (breakdown.compute_s, breakdown.bubble_s) == (16.0, 3.0)


def test_one_group_for_the_batch_adds_its_time():
    breakdown = step(
        module("vision", stage(5.0, 7.0), shared=True),
        module("language", *[stage(1.0, 2.0)] * 3),
        kind="colocated",
        num_microbatches=64,
    )

    # 5 + (64 + 3 - 1) * 3 + 7
    assert breakdown.step_s == 210.0


def test_sharing_ranks_synchronise_one_module_after_the_other():
    breakdown = step(
        module("vision", stage(1.0, 1.0, sync_s=0.5, optimizer_s=0.25), shared=True),
        module("language", stage(1.0, 2.0, sync_s=2.0, optimizer_s=1.0)),
        kind="no_pipelining",
        num_microbatches=2,
    )

    assert (breakdown.sync_s, breakdown.optimizer_s) == (2.5, 1.25)
    assert breakdown.step_s == 2 * 5 + 2.5 + 1.25


def test_communication_is_a_part_of_the_busy_time():
    breakdown = step(module("language", stage(1.0, 2.0, communication_s=0.5)), num_microbatches=4)

    assert (breakdown.compute_s, breakdown.communication_s) == (10.0, 2.0)


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_closed_form_is_close_to_the_simulation(setting):
    found = deviations(setting, num_steps=100, seed=1)

    assert found["median"] < 0.001
    assert found["percentile_90"] < 0.02
    assert found["most"] < (0.06 if setting.hop_s < 0.5 else 0.25)


def test_closed_form_of_a_pipeline_is_never_more_than_the_simulation():
    drawn = random.Random(2)
    settings = [setting for setting in SETTINGS if setting.kind == "1f1b"]

    for drawn_step in (draw_step(drawn, setting) for setting in settings for _ in range(60)):
        assert drawn_step.closed_form_s() <= drawn_step.simulated_s() * (1 + 1e-9)


def test_more_microbatches_never_take_less_time():
    drawn = random.Random(3)
    stages = [
        PipelineStage(
            drawn.random(), drawn.random(), (Hop(s + 1, drawn.random()),) if s < 7 else ()
        )
        for s in range(8)
    ]

    times_s = [pipeline_s(stages, num_microbatches=count) for count in range(1, 40)]

    assert times_s == sorted(times_s)
