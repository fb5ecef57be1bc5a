"""What the cost model says of a plan's step, beside its closed form and its parts."""

from dataclasses import replace

import pytest

from megatron_mosaic.cost.cost_model import CostModel
from megatron_mosaic.cost.costs import ModuleInStep
from megatron_mosaic.cost.sizes import ParallelSizes
from megatron_mosaic.cost.step import step_breakdown
from megatron_mosaic.errors import PlanError
from tests.planner.problems import cluster, encoder, model
from tests.schedule.plans import place, plan_of

LANGUAGE = place("language", *range(4), tp=2, pp=2)
VISION = encoder("vision", trainable=None)


def test_step_of_one_rank_is_all_its_tasks_and_what_happens_once():
    costs = CostModel(model(), cluster(8))
    plan = plan_of("no_pipelining", place("language", 0), num_microbatches=16)
    (stage,) = costs.stages(costs.module("language", ParallelSizes(), samples=1))

    breakdown = costs.estimate(plan).breakdown

    assert breakdown.bubble_s == pytest.approx(0.0, abs=1e-9)
    assert breakdown.optimizer_s == stage.optimizer_s
    assert breakdown.step_s == pytest.approx(
        16 * (stage.forward_s + stage.backward_s) + stage.sync_s + stage.optimizer_s
    )


@pytest.mark.parametrize("num_microbatches", [4, 16])
def test_step_of_a_pipeline_is_its_closed_form(num_microbatches):
    costs = CostModel(model(), cluster(8))
    plan = plan_of("1f1b", LANGUAGE, num_microbatches=num_microbatches)
    stages = costs.stages(costs.module("language", ParallelSizes.of(LANGUAGE), samples=1))

    found = costs.estimate(plan).breakdown

    closed = step_breakdown(
        {"language": ModuleInStep(name="language", stages=stages)},
        edges=(),
        kind="1f1b",
        num_microbatches=num_microbatches,
    )
    assert found.step_s == pytest.approx(closed.step_s, rel=0.02)
    assert found.compute_s == pytest.approx(closed.compute_s)
    assert found.communication_s == pytest.approx(closed.communication_s)


def test_encoder_before_every_microbatch_of_the_first_stage_makes_that_stage_slower():
    # The pipeline behind it works meanwhile, and does not pause.
    costs = CostModel(model(VISION), cluster(8))
    plan = plan_of("colocated", place("vision", 0, 1, tp=2), LANGUAGE, num_microbatches=16, group=1)
    (vision,) = costs.stages(costs.module("vision", ParallelSizes(tp=2, etp=2), samples=1))
    first, last = costs.stages(costs.module("language", ParallelSizes.of(LANGUAGE), samples=1))
    joined = replace(
        first,
        forward_s=first.forward_s + vision.forward_s,
        backward_s=first.backward_s + vision.backward_s,
        sync_s=first.sync_s + vision.sync_s,
        optimizer_s=first.optimizer_s + vision.optimizer_s,
    )

    step_s = costs.estimate(plan).step_s

    closed = step_breakdown(
        {"language": ModuleInStep(name="language", stages=(joined, last))},
        edges=(),
        kind="1f1b",
        num_microbatches=16,
    )
    assert step_s == pytest.approx(closed.step_s, rel=0.02)


def test_rows_made_where_they_are_taken_travel_in_no_time():
    costs = CostModel(model(VISION), cluster(8))
    edge = ("vision", "language")

    def boundary_s(vision):
        plan = plan_of("colocated", vision, LANGUAGE, num_microbatches=16, group=1)
        return costs.plan_boundaries_s(plan)[edge]

    assert boundary_s(place("vision", 0, 1, tp=2)) == 0.0
    assert boundary_s(place("vision", 1, 0, tp=2)) > 0.0  # other places of the grid
    assert boundary_s(place("vision", 0, 1, dp=2)) > 0.0
    assert boundary_s(place("vision", 2, 3, tp=2)) > 0.0  # ranks of the second stage


@pytest.mark.parametrize(
    ("placement", "message"),
    [
        (
            place("vision", 4, trainable=()),
            r"trainable=\[\] must be .* as in model",
        ),
        (place("audio", 4), "model small: module=audio must be one of vision, language"),
        (replace(place("vision", 4, 5, pp=2), layers_per_stage=(3, 2)), "add up to the 6 layers"),
    ],
)
def test_plan_for_another_model_is_refused(placement, message):
    plan = plan_of("1f1b", placement, LANGUAGE, num_microbatches=4)

    with pytest.raises(PlanError, match=message):
        CostModel(model(VISION), cluster(8)).estimate(plan)
