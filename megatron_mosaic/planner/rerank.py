"""Step times of estimates by simulation of their schedules."""

from collections.abc import Sequence
from typing import NamedTuple

from megatron_mosaic.cost.cost_model import CostModel
from megatron_mosaic.cost.costs import StepEstimate
from megatron_mosaic.planner.candidate import plan_of
from megatron_mosaic.planner.estimate import Estimate
from megatron_mosaic.planner.problem import Problem

MAX_TASKS = 400_000
"""Tasks up to which a step is simulated: a few seconds."""


class Simulated(NamedTuple):
    """An estimate in closed form, and the cost model's of its plan.

    Args:
        estimate: What the search has ranked by.
        step: Of the plan by simulation; the closed form's if the step has too many tasks.
        is_simulated: Whether it is.
    """

    estimate: Estimate
    step: StepEstimate
    is_simulated: bool

    @property
    def step_s(self) -> float:
        """Seconds of a step."""
        return self.step.step_s


def num_tasks(estimate: Estimate) -> int:
    """Tasks of a step."""
    return sum(
        2 * len(hosted.stages) * estimate.num_microbatches // hosted.group
        for hosted in estimate.modules.values()
    )


def simulated(estimate: Estimate, problem: Problem, cost_model: CostModel) -> Simulated:
    """Simulates a step of an estimate's plan."""
    if num_tasks(estimate) > MAX_TASKS:
        step = StepEstimate(
            breakdown=estimate.breakdown,
            memory=estimate.memory,
            flops=cost_model.step_flops(num_samples=problem.global_batch_size),
            num_gpus=problem.num_gpus,
        )
        return Simulated(estimate, step, False)
    plan = plan_of(
        estimate.candidate,
        model=problem.model,
        num_gpus=problem.num_gpus,
        global_batch_size=problem.global_batch_size,
        layers_per_stage=estimate.layers_per_stage,
    )
    return Simulated(estimate, cost_model.estimate(plan), True)


def rerank(
    estimates: Sequence[Estimate], problem: Problem, cost_model: CostModel
) -> list[Simulated]:
    """Orders estimates by their simulated step times; equals stay in their order."""
    found = [simulated(estimate, problem, cost_model) for estimate in estimates]
    return sorted(found, key=lambda entry: entry.step_s)
