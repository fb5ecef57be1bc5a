"""Step times of the best layouts by simulation, under every schedule that they allow."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import inf

from megatron_mosaic.cost.cost_model import CostModel
from megatron_mosaic.layout.placement import LANGUAGE
from megatron_mosaic.planner.estimate import Estimate
from megatron_mosaic.planner.filling import LEAST_GAIN, filled, refined
from megatron_mosaic.planner.legal_sizes import divisors
from megatron_mosaic.planner.problem import Problem
from megatron_mosaic.planner.simulated import Simulated, num_tasks, plan_under, simulated

MAX_LISTED_TASKS = 30_000
"""Tasks with virtual stages, whose lists are built first, up to which a step is simulated."""

NUM_COMPARED = 8
"""Layouts of the search that are simulated under other schedules, at least."""

NUM_REFINED = 3
"""Of these, the fastest that could be faster than all with less waiting are refined."""


def with_other_schedules(
    first: Simulated,
    problem: Problem,
    cost_model: CostModel,
    *,
    below_s: float = inf,
    stock: bool = False,
) -> Iterator[Simulated]:
    """Yields a layout under every schedule that may be faster, fits, and is not ruled out.

    Args:
        first: The layout under the schedule of its closed form.
        problem: What is asked.
        cost_model: What things cost.
        below_s: Step time that another schedule must be below to be of use.
        stock: Only schedules that stock Megatron has.
    """
    kind = problem.pins.kind
    if kind in (None, first.candidate.kind):
        yield first
        if first.least_s > min(first.step_s * (1 - LEAST_GAIN), below_s):
            return
    if kind in (None, "interleaved"):
        yield from _interleaved(first, problem, cost_model)
    if kind in (None, "bubble_fill") and not stock:
        yield from filled(first, problem, cost_model)


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
        plan = plan_under(other, split, problem)
        step = cost_model.estimate(plan)
        if step.step_s > fastest_s * (1 - LEAST_GAIN):
            return
        if step.peak_bytes <= problem.memory_bytes:
            fastest_s = step.step_s
            yield Simulated(first.estimate, other, split, plan, step, True)


def rerank(
    estimates: Sequence[Estimate], problem: Problem, cost_model: CostModel, *, top: int
) -> list[Simulated]:
    """Orders layouts by their simulated step times, each under its fastest schedule.

    Equals stay in their order. A layout without any schedule that is asked for is left out; those
    of modules that run at the same time are examined elsewhere.

    Args:
        estimates: The layouts.
        problem: What is asked.
        cost_model: What things cost.
        top: Layouts that are of interest; others stay under the schedule of their closed form
            where no schedule could bring them among these.
    """
    found: list[Simulated] = []
    for estimate in estimates if problem.pins.kind != "concurrent" else ():
        first = simulated(estimate, problem, cost_model)
        below_s = sorted(entry.step_s for entry in found)[top - 1] if len(found) >= top else inf
        schedules = [
            entry
            for entry in with_other_schedules(first, problem, cost_model, below_s=below_s)
            if problem.pins.placement in (None, entry.candidate.placement)
        ]
        if schedules:
            found.append(min(schedules, key=lambda entry: entry.step_s))
    return _with_refined(found, problem, cost_model)


def _with_refined(
    found: Sequence[Simulated], problem: Problem, cost_model: CostModel
) -> list[Simulated]:
    """Refines the layouts that could become the fastest, and orders all."""
    entries = sorted(found, key=lambda entry: entry.step_s)
    if not entries or problem.pins.kind not in (None, "bubble_fill"):
        return entries
    fastest_s, num_refined = entries[0].step_s, 0
    for position, entry in enumerate(entries):
        if entry.least_s < fastest_s * (1 - LEAST_GAIN) and num_refined < NUM_REFINED:
            entries[position] = refined(entry, problem, cost_model)
            fastest_s = min(fastest_s, entries[position].step_s)
            num_refined += 1
    return sorted(entries, key=lambda entry: entry.step_s)
