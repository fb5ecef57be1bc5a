from dataclasses import replace

import pytest

from megatron_mosaic.layout.plan import Plan
from megatron_mosaic.report.deviation import (
    StepTerms,
    deviation_warning,
    measured_terms,
    predicted_terms,
    worst_term,
)
from megatron_mosaic.report.prediction import read_prediction
from megatron_mosaic.schedule.graph import Stage
from megatron_mosaic.schedule.plan_program import program_of_plan
from megatron_mosaic.schedule.simulate import PassTimes

PREDICTED = StepTerms(
    step_s=1.0,
    compute_s=0.6,
    communication_s=0.05,
    bubble_s=0.1,
    sync_s=0.15,
    optimizer_s=0.1,
    modules_s={"language": 0.5, "vision": 0.1},
)

# Two stages, two microbatches, forward passes of 1 s and backward passes of 2 s:
#   stage 0   F0 F1 .  B0 .. B1      stage 1   .  F0 B0 F1 B1
PLAN = """
format: 1
world_size: 2
global_batch_size: 2
micro_batch_size: 1
modules:
  language: {ranks: 0-1, pipeline_model_parallel_size: 2}
schedule: {kind: 1f1b}
predicted:
  step_s: 12.0
  breakdown: {compute_s: 5.0, communication_s: 1.0, bubble_s: 4.0, sync_s: 1.5, optimizer_s: 0.5}
  tasks_s: {language.0: [1.0, 2.0], language.1: [1.0, 2.0]}
  transfers_s: {language.0 -> language.1: 0.5}
"""


def _plan():
    return Plan.loads(PLAN, where="plan")


def test_terms_of_a_prediction_are_told_apart_by_a_simulation_without_transfers():
    plan = _plan()

    terms = predicted_terms(plan, read_prediction(plan))

    # The way through: F0, F0 B0 F1 B1 on the last stage, B1 behind it: 1 + 6 + 2 = 9 s, and with
    # half a second for each of two transfers on it 10 s. Its ranks work for 6 s.
    assert terms == StepTerms(
        step_s=12.0,
        compute_s=6.0,
        communication_s=1.0,
        bubble_s=3.0,
        sync_s=1.5,
        optimizer_s=0.5,
        modules_s={"language": 6.0},
    )
    assert terms is not None
    assert terms.other_s == pytest.approx(0.0)


def test_plan_without_prediction_has_no_terms():
    plan = replace(_plan(), predicted=None)

    assert predicted_terms(plan, read_prediction(plan)) is None


def test_terms_of_a_measured_step_add_up_to_it():
    terms = measured_terms(
        _plan(),
        program_of_plan(_plan()),
        step_s=16.0,
        walk_s=11.0,
        close_s=13.0,
        busy_s=6.0,
        stages_s={Stage("language", 0): PassTimes(1.0, 2.0), Stage("language", 1): PassTimes(1, 2)},
        modules_s={"language": 6.0},
    )

    # Of the 11 s of the walk a step without transfers takes 9, of which 6 are tasks.
    assert (terms.compute_s, terms.communication_s, terms.bubble_s) == (6.0, 2.0, 3.0)
    assert (terms.sync_s, terms.optimizer_s, terms.other_s) == (2.0, 3.0, 0.0)


def test_step_near_its_prediction_is_not_worth_a_warning():
    assert deviation_warning(PREDICTED, replace(PREDICTED, step_s=1.2, sync_s=0.35)) is None
    assert deviation_warning(PREDICTED, replace(PREDICTED, step_s=0.8)) is None


@pytest.mark.parametrize(
    ("term", "advice"),
    [
        ("communication", "measure these links"),
        ("bubble", "see who waits for whom"),
        ("sync", "compare the run's arguments"),
        ("optimizer", "compare the run's arguments"),
    ],
)
def test_warning_names_the_term_that_differs_most(term, advice):
    own_s = PREDICTED.of(term)
    measured = replace(PREDICTED, step_s=1.5, compute_s=0.65, **{f"{term}_s": own_s + 0.45})

    warning = deviation_warning(PREDICTED, measured)

    assert warning is not None
    assert f"a step takes 1.50 s, +50% against the plan's 1.00 s; most of that is {term}: " in (
        warning
    )
    assert advice in warning


def test_warning_about_tasks_names_their_module():
    measured = replace(
        PREDICTED, step_s=1.4, compute_s=1.0, modules_s={"language": 0.52, "vision": 0.48}
    )

    warning = deviation_warning(PREDICTED, measured)

    assert warning is not None
    assert "most of that is compute, of vision above all: 1.00 s and not 600 ms; " in warning


def test_step_that_is_faster_is_named_by_what_it_saves():
    measured = replace(PREDICTED, step_s=0.6, compute_s=0.2, sync_s=0.2)

    assert worst_term(PREDICTED, measured) == "compute"
    warning = deviation_warning(PREDICTED, measured)
    assert warning is not None
    assert "-40% against" in warning


def test_time_in_no_term_is_what_runs_between_steps():
    measured = replace(PREDICTED, step_s=2.0)

    assert worst_term(PREDICTED, measured) == "other"
    assert measured.of("other") == pytest.approx(1.0)
