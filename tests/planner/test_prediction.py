"""What a planned plan carries for figures is what the planner found."""

import pytest
import yaml

from megatron_mosaic.layout.plan import Plan
from megatron_mosaic.layout.ranks import parse_ranks
from megatron_mosaic.planner.planner import make_plan
from megatron_mosaic.report.prediction import (
    predicted_timeline,
    read_baseline,
    read_prediction,
)
from tests.planner.test_plans import SMALL


@pytest.fixture(params=sorted(SMALL))
def answer(request):
    return make_plan(SMALL[request.param])


def test_notes_give_back_what_the_planner_found(answer):
    plan = Plan.loads(answer.plan().to_yaml(), where="plan.yaml")

    prediction = read_prediction(plan)

    estimate = answer.choice.step
    once_s = estimate.breakdown.sync_s + estimate.breakdown.optimizer_s
    simulated_s = predicted_timeline(plan, prediction).makespan_s + once_s
    assert prediction.step_s == pytest.approx(answer.choice.step_s, rel=1e-5)
    assert simulated_s == pytest.approx(answer.choice.step_s, rel=1e-4)
    fullest = max(bar.total_bytes for bar in prediction.memory)
    assert fullest == pytest.approx(estimate.peak_bytes, rel=1e-6)
    assert prediction.capacity_bytes == answer.problem.cluster.gpu.memory_bytes


def test_notes_have_memory_for_every_rank_that_hosts_a_module(answer):
    plan = answer.plan()

    hosts = {rank for placement in plan.modules.values() for rank in placement.ranks}

    assert plan.predicted is not None
    written = [yaml.safe_load(bar["ranks"]) for bar in plan.predicted["memory_bytes"]]
    noted = [rank for ranks in written for rank in parse_ranks("ranks", ranks)]
    assert sorted(noted) == sorted(hosts)


def test_notes_hold_the_homogeneous_plan_with_the_times_of_its_tasks(answer):
    plan = Plan.loads(answer.plan().to_yaml(), where="plan.yaml")

    baseline = read_baseline(plan)

    assert baseline is not None
    assert answer.baseline is not None
    assert baseline.plan.digest() == answer.baseline.plan.digest()
    terms = answer.baseline.step.breakdown
    tasks_s = predicted_timeline(*baseline).makespan_s
    step_s = tasks_s + terms.sync_s + terms.optimizer_s
    assert step_s == pytest.approx(answer.baseline.step_s, rel=1e-4)
