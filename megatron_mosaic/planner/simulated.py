"""A layout's plan with its step, as it is simulated."""

from collections.abc import Mapping
from typing import NamedTuple

from megatron_mosaic.cost.cost_model import CostModel
from megatron_mosaic.cost.costs import StepEstimate
from megatron_mosaic.layout.plan import Plan
from megatron_mosaic.planner.candidate import Candidate, plan_of
from megatron_mosaic.planner.estimate import Estimate
from megatron_mosaic.planner.problem import Problem

MAX_TASKS = 400_000
"""Tasks up to which a step is simulated: a few seconds."""


class Simulated(NamedTuple):
    """A layout with the schedule under which it is fastest.

    Args:
        estimate: The layout in closed form, under the schedule that the search knows.
        candidate: The layout with the schedule that runs.
        layers_per_stage: Split of every module under that schedule.
        plan: Its plan, without notes.
        step: Of the plan by simulation; the closed form's if the step has too many tasks.
        is_simulated: Whether it is.
    """

    estimate: Estimate
    candidate: Candidate
    layers_per_stage: Mapping[str, tuple[int, ...]]
    plan: Plan
    step: StepEstimate
    is_simulated: bool

    @property
    def step_s(self) -> float:
        """Seconds of a step."""
        return self.step.step_s

    @property
    def least_s(self) -> float:
        """Seconds of a step without waits: no other order of the same tasks is faster."""
        return self.step_s - self.step.breakdown.bubble_s


def num_tasks(estimate: Estimate) -> int:
    """Tasks of a step."""
    return sum(
        2 * len(hosted.stages) * estimate.num_microbatches // hosted.group
        for hosted in estimate.modules.values()
    )


def simulated(estimate: Estimate, problem: Problem, cost_model: CostModel) -> Simulated:
    """Simulates a step of an estimate's plan, under the schedule of its closed form."""
    candidate, split = estimate.candidate, estimate.layers_per_stage
    plan = plan_under(candidate, split, problem)
    if num_tasks(estimate) <= MAX_TASKS:
        return Simulated(estimate, candidate, split, plan, cost_model.estimate(plan), True)
    closed = StepEstimate(
        breakdown=estimate.breakdown,
        memory=estimate.memory,
        flops=cost_model.step_flops(num_samples=problem.global_batch_size),
        num_gpus=problem.num_gpus,
    )
    return Simulated(estimate, candidate, split, plan, closed, False)


def plan_under(
    candidate: Candidate, layers_per_stage: Mapping[str, tuple[int, ...]], problem: Problem
) -> Plan:
    """Places a candidate on the ranks of a problem."""
    return plan_of(
        candidate,
        model=problem.model,
        num_gpus=problem.num_gpus,
        global_batch_size=problem.global_batch_size,
        layers_per_stage=layers_per_stage,
    )
