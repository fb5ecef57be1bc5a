"""Step times of the best layouts by simulation, under every schedule that they allow."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from math import inf
from typing import NamedTuple

from megatron_mosaic.cost.cost_model import CostModel
from megatron_mosaic.cost.costs import StepEstimate
from megatron_mosaic.layout.placement import LANGUAGE
from megatron_mosaic.layout.plan import Plan
from megatron_mosaic.planner.candidate import Candidate, plan_of
from megatron_mosaic.planner.estimate import Estimate
from megatron_mosaic.planner.legal_sizes import divisors
from megatron_mosaic.planner.problem import Problem
from megatron_mosaic.schedule.fill import fill, least_live
from megatron_mosaic.schedule.order import write_order

MAX_TASKS = 400_000
"""Tasks up to which a step is simulated: a few seconds."""

MAX_LISTED_TASKS = 30_000
"""The same with virtual stages, whose lists of tasks are built first."""

MAX_FILLED_TASKS = 10_000
"""The same for tasks that are placed one by one into the waits of others."""

NUM_COMPARED = 8
"""Layouts of the search that are simulated under other schedules, at least."""

LEAST_BUBBLE = 0.001
"""Share of a step that is too little to be worth another schedule, or more virtual stages."""


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


def num_tasks(estimate: Estimate) -> int:
    """Tasks of a step."""
    return sum(
        2 * len(hosted.stages) * estimate.num_microbatches // hosted.group
        for hosted in estimate.modules.values()
    )


def simulated(estimate: Estimate, problem: Problem, cost_model: CostModel) -> Simulated:
    """Simulates a step of an estimate's plan, under the schedule of its closed form."""
    candidate, split = estimate.candidate, estimate.layers_per_stage
    plan = _plan(problem, candidate, split)
    if num_tasks(estimate) <= MAX_TASKS:
        return Simulated(estimate, candidate, split, plan, cost_model.estimate(plan), True)
    closed = StepEstimate(
        breakdown=estimate.breakdown,
        memory=estimate.memory,
        flops=cost_model.step_flops(num_samples=problem.global_batch_size),
        num_gpus=problem.num_gpus,
    )
    return Simulated(estimate, candidate, split, plan, closed, False)


def _plan(
    problem: Problem, candidate: Candidate, layers_per_stage: Mapping[str, tuple[int, ...]]
) -> Plan:
    return plan_of(
        candidate,
        model=problem.model,
        num_gpus=problem.num_gpus,
        global_batch_size=problem.global_batch_size,
        layers_per_stage=layers_per_stage,
    )


def with_other_schedules(
    first: Simulated, problem: Problem, cost_model: CostModel, *, below_s: float = inf
) -> Iterator[Simulated]:
    """Yields a layout under every schedule that may be faster, fits, and is not ruled out.

    Args:
        first: The layout under the schedule of its closed form.
        problem: What is asked.
        cost_model: What things cost.
        below_s: Step time that another schedule must be below to be of use.
    """
    kind = problem.pins.kind
    if kind in (None, first.candidate.kind):
        yield first
        bubble_s = first.step.breakdown.bubble_s
        if bubble_s < LEAST_BUBBLE * first.step_s or first.step_s - bubble_s > below_s:
            return
    if kind in (None, "interleaved"):
        yield from _interleaved(first, problem, cost_model)
    if kind in (None, "bubble_fill"):
        yield from _filled(first, problem, cost_model)


def _interleaved(first: Simulated, problem: Problem, cost_model: CostModel) -> Iterator[Simulated]:
    """Yields a 1F1B layout with virtual stages of the language model, until more gain no more.

    The bubble shrinks with their number, and so do live activations, but messages become more.
    What Megatron asks for: microbatches that fill the pipeline, and layers that divide evenly.
    """
    candidate, sizes = first.candidate, first.candidate.language
    num_layers = problem.model.language.num_layers
    pinned = "layers_per_stage" in problem.pins.modules.get(LANGUAGE, {})
    if candidate.kind != "1f1b" or sizes.pp == 1 or pinned:
        return
    if num_layers % sizes.pp or first.estimate.num_microbatches % sizes.pp:
        return
    fastest_s = inf
    for virtual in divisors(num_layers // sizes.pp)[1:]:
        if num_tasks(first.estimate) * virtual > MAX_LISTED_TASKS:
            return
        stages = sizes.pp * virtual
        split = {**first.layers_per_stage, LANGUAGE: (num_layers // stages,) * stages}
        other = replace(candidate, kind="interleaved", language=replace(sizes, chunks=virtual))
        plan = _plan(problem, other, split)
        step = cost_model.estimate(plan)
        if step.step_s > fastest_s * (1 - LEAST_BUBBLE):
            return
        if step.peak_bytes <= problem.memory_bytes:
            fastest_s = step.step_s
            yield Simulated(first.estimate, other, split, plan, step, True)


def _filled(first: Simulated, problem: Problem, cost_model: CostModel) -> Iterator[Simulated]:
    """Yields a colocated layout with encoder tasks in the waits of its pipeline.

    Smaller groups fit into smaller waits, until their tasks take longer than what that saves.
    Where too many tasks are live for the memory, as few are as the pipeline allows.
    """
    candidate = first.candidate
    if candidate.kind != "colocated" or candidate.language.pp == 1:
        return
    fastest_s = inf
    samples = candidate.micro_batch_size * candidate.language.dp
    most = max(encoder.sizes.dp for encoder in candidate.encoders)
    whole = candidate.encoder_group == first.estimate.num_microbatches
    for group in divisors(candidate.encoder_group)[-1 - whole :: -1]:
        tasks = num_tasks(first.estimate) * candidate.encoder_group // group
        pinned = problem.pins.encoder_group not in (None, group)
        if tasks > MAX_FILLED_TASKS or group * samples < most or pinned:
            continue
        other = replace(candidate, kind="bubble_fill", encoder_group=group)
        unbound = _plan(problem, other, first.layers_per_stage)
        bound = replace(unbound.schedule, max_live=least_live(unbound))
        for plan in (unbound, replace(unbound, schedule=bound)):
            plan = with_order(plan, cost_model)
            step = cost_model.estimate(plan)
            if step.peak_bytes <= problem.memory_bytes:
                if step.step_s > fastest_s:
                    return
                fastest_s = step.step_s
                yield Simulated(first.estimate, other, first.layers_per_stage, plan, step, True)
                break


def with_order(plan: Plan, cost_model: CostModel) -> Plan:
    """Gives a plan the order of tasks that fills the waits which the durations leave."""
    order = write_order(plan, fill(plan, **cost_model.plan_durations(plan)._asdict()))
    return replace(plan, schedule=replace(plan.schedule, order=order))


def rerank(
    estimates: Sequence[Estimate], problem: Problem, cost_model: CostModel, *, top: int
) -> list[Simulated]:
    """Orders layouts by their simulated step times, each under its fastest schedule.

    Equals stay in their order. A layout without any schedule that is asked for is left out.

    Args:
        estimates: The layouts.
        problem: What is asked.
        cost_model: What things cost.
        top: Layouts that are of interest; others stay under the schedule of their closed form
            where no schedule could bring them among these.
    """
    found: list[Simulated] = []
    for estimate in estimates:
        first = simulated(estimate, problem, cost_model)
        below_s = sorted(entry.step_s for entry in found)[top - 1] if len(found) >= top else inf
        schedules = [
            entry
            for entry in with_other_schedules(first, problem, cost_model, below_s=below_s)
            if problem.pins.placement in (None, entry.candidate.placement)
        ]
        if schedules:
            found.append(min(schedules, key=lambda entry: entry.step_s))
    return sorted(found, key=lambda entry: entry.step_s)
