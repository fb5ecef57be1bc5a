"""Step times of estimates by simulation of their schedules."""

from collections.abc import Sequence
from typing import NamedTuple

from megatron_mosaic.cost.costs import StageCosts
from megatron_mosaic.layout.placement import LANGUAGE
from megatron_mosaic.planner.candidate import plan_of
from megatron_mosaic.planner.estimate import Estimate
from megatron_mosaic.planner.hosted import Hosted
from megatron_mosaic.planner.problem import Problem
from megatron_mosaic.schedule.graph import Stage
from megatron_mosaic.schedule.plan_program import program_of_plan
from megatron_mosaic.schedule.simulate import PassTimes, Timeline, simulate
from megatron_mosaic.schedule.steps import Edge

MAX_TASKS = 400_000
"""Tasks up to which a step is simulated: a few seconds."""


class Simulated(NamedTuple):
    """An estimate, and its step time by simulation; the closed form's if it is too large."""

    estimate: Estimate
    step_s: float
    is_simulated: bool


def num_tasks(estimate: Estimate) -> int:
    """Tasks of a step."""
    return sum(
        2 * len(hosted.stages) * estimate.num_microbatches // hosted.group
        for hosted in estimate.modules.values()
    )


def simulated(estimate: Estimate, problem: Problem) -> Simulated:
    """Simulates a step; what happens once in a step is added as in the closed form."""
    if num_tasks(estimate) > MAX_TASKS:
        return Simulated(estimate, estimate.step_s, False)
    breakdown = estimate.breakdown
    once_s = breakdown.sync_s + breakdown.optimizer_s
    return Simulated(estimate, timeline(estimate, problem).makespan_s + once_s, True)


def timeline(estimate: Estimate, problem: Problem) -> Timeline:
    """Simulates the schedule of a step."""
    plan = plan_of(
        estimate.candidate,
        model=problem.model,
        num_gpus=problem.num_gpus,
        global_batch_size=problem.global_batch_size,
        layers_per_stage=estimate.layers_per_stage,
    )
    tasks_s, transfers_s = durations(estimate)
    return simulate(program_of_plan(plan), tasks_s=tasks_s, transfers_s=transfers_s)


def durations(estimate: Estimate) -> tuple[dict[Stage, PassTimes], dict[Edge, float]]:
    """Times of an estimate's tasks, and of a microbatch's transfers, as a simulation takes them."""
    tasks_s: dict[Stage, PassTimes] = {}
    transfers_s: dict[Edge, float] = {}
    for name, hosted in estimate.modules.items():
        for number, stage in enumerate(hosted.stages):
            tasks_s[Stage(name, number)] = _times(hosted, stage, number)
            if number:
                hop_s = hosted.stages[number - 1].hop_s / hosted.group
                transfers_s[Edge(name, number - 1, name, number)] = hop_s
        if hosted.choice is not None and not hosted.choice.shares:
            edge = Edge(name, len(hosted.stages) - 1, LANGUAGE, 0)
            transfers_s[edge] = hosted.entry_s / hosted.group
    return tasks_s, transfers_s


def rerank(estimates: Sequence[Estimate], problem: Problem) -> list[Simulated]:
    """Orders estimates by their simulated step times; equals stay in their order."""
    return sorted((simulated(e, problem) for e in estimates), key=lambda found: found.step_s)


def _times(hosted: Hosted, stage: StageCosts, number: int) -> PassTimes:
    # On shared ranks nothing else runs while rows change their layout.
    last = number == len(hosted.stages) - 1
    shares = hosted.choice is not None and hosted.choice.shares
    entry_s = hosted.entry_s if last and shares else 0.0
    back_s = entry_s if stage.backward_s else 0.0
    return PassTimes(stage.forward_s + entry_s, stage.backward_s + back_s)
