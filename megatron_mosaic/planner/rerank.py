"""Step times of the best layouts by simulation, under every schedule that they allow."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from megatron_mosaic.cost.cost_model import CostModel
from megatron_mosaic.cost.costs import StepEstimate
from megatron_mosaic.layout.placement import LANGUAGE
from megatron_mosaic.layout.plan import Plan
from megatron_mosaic.planner.candidate import Candidate, plan_of
from megatron_mosaic.planner.estimate import Estimate
from megatron_mosaic.planner.legal_sizes import divisors
from megatron_mosaic.planner.problem import Problem

MAX_TASKS = 400_000
"""Tasks up to which a step is simulated: a few seconds."""

MAX_LISTED_TASKS = 30_000
"""The same for schedules whose lists of tasks have to be built first."""


class Simulated(NamedTuple):
    """A layout with the schedule under which it is fastest.

    Args:
        estimate: The layout in closed form, under the schedule that the search knows.
        candidate: The layout with the schedule that runs.
        layers_per_stage: Split of every module under that schedule.
        step: Of the plan by simulation; the closed form's if the step has too many tasks.
        is_simulated: Whether it is.
    """

    estimate: Estimate
    candidate: Candidate
    layers_per_stage: Mapping[str, tuple[int, ...]]
    step: StepEstimate
    is_simulated: bool

    @property
    def step_s(self) -> float:
        """Seconds of a step."""
        return self.step.step_s

    def plan(self, problem: Problem, *, inputs: Mapping[str, str] | None = None) -> Plan:
        """Its plan, without notes on the prediction."""
        return plan_of(
            self.candidate,
            model=problem.model,
            num_gpus=problem.num_gpus,
            global_batch_size=problem.global_batch_size,
            layers_per_stage=self.layers_per_stage,
            inputs=inputs,
        )


def num_tasks(estimate: Estimate) -> int:
    """Tasks of a step."""
    return sum(
        2 * len(hosted.stages) * estimate.num_microbatches // hosted.group
        for hosted in estimate.modules.values()
    )


def simulated(estimate: Estimate, problem: Problem, cost_model: CostModel) -> Simulated:
    """Simulates a step of an estimate's plan, under the schedule of its closed form."""
    closed = StepEstimate(
        breakdown=estimate.breakdown,
        memory=estimate.memory,
        flops=cost_model.step_flops(num_samples=problem.global_batch_size),
        num_gpus=problem.num_gpus,
    )
    found = Simulated(estimate, estimate.candidate, estimate.layers_per_stage, closed, False)
    if num_tasks(estimate) > MAX_TASKS:
        return found
    return found._replace(step=cost_model.estimate(found.plan(problem)), is_simulated=True)


def interleavings(estimate: Estimate, problem: Problem) -> Iterator[Candidate]:
    """Yields a 1F1B layout with virtual stages of the language model, of equal layers each.

    What Megatron asks for: microbatches that fill the pipeline, and layers that divide.
    """
    candidate, sizes = estimate.candidate, estimate.candidate.language
    num_layers = problem.model.language.num_layers
    pinned = "layers_per_stage" in problem.pins.modules.get(LANGUAGE, {})
    if candidate.kind != "1f1b" or sizes.pp == 1 or pinned:
        return
    if num_layers % sizes.pp or estimate.num_microbatches % sizes.pp:
        return
    for virtual in divisors(num_layers // sizes.pp)[1:]:
        if num_tasks(estimate) * virtual <= MAX_LISTED_TASKS:
            yield replace(candidate, kind="interleaved", language=replace(sizes, chunks=virtual))


def with_other_schedules(
    first: Simulated, problem: Problem, cost_model: CostModel
) -> Iterator[Simulated]:
    """Yields a layout under every schedule that may be faster, fits, and is not ruled out."""
    kind = problem.pins.kind
    if kind in (None, first.candidate.kind):
        yield first
    if kind not in (None, "interleaved"):
        return
    breakdown = first.step.breakdown
    if kind is None and breakdown.bubble_s < 0.001 * first.step_s:
        return  # nothing to gain
    num_layers = problem.model.language.num_layers
    for candidate in interleavings(first.estimate, problem):
        stages = candidate.language.pp * candidate.language.chunks
        split = {**first.layers_per_stage, LANGUAGE: (num_layers // stages,) * stages}
        other = first._replace(candidate=candidate, layers_per_stage=split, is_simulated=True)
        other = other._replace(step=cost_model.estimate(other.plan(problem)))
        if other.step.peak_bytes <= problem.memory_bytes:
            yield other


def rerank(
    estimates: Sequence[Estimate], problem: Problem, cost_model: CostModel
) -> list[Simulated]:
    """Orders layouts by their simulated step times, each under its fastest schedule.

    Equals stay in their order. A layout without any schedule that is asked for is left out.
    """
    found = []
    for estimate in estimates:
        first = simulated(estimate, problem, cost_model)
        schedules = list(with_other_schedules(first, problem, cost_model))
        if schedules:
            found.append(min(schedules, key=lambda entry: entry.step_s))
    return sorted(found, key=lambda entry: entry.step_s)
