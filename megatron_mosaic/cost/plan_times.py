"""Times of a plan's tasks and transfers, and what its ranks do with a step's time."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from megatron_mosaic.cost.costs import StageCosts, StepBreakdown
from megatron_mosaic.cost.plan_memory import task_microbatches
from megatron_mosaic.layout.plan import Plan
from megatron_mosaic.schedule.graph import RankKind, Stage, rank_kinds
from megatron_mosaic.schedule.lanes import has_lanes
from megatron_mosaic.schedule.simulate import LaneTimes, PassTimes, Timeline
from megatron_mosaic.schedule.steps import Edge


class Durations(NamedTuple):
    """What a simulation of a plan's schedule takes.

    Args:
        tasks_s: Time of a task of every stage, the longest one.
        transfers_s: Of one microbatch over every edge.
        lanes: What modules that run at the same time make of each other's times; None where they
            run one at a time.
    """

    tasks_s: dict[Stage, PassTimes]
    transfers_s: dict[Edge, float]
    lanes: LaneTimes | None = None


class StageInPlan(NamedTuple):
    """A stage as a plan runs it.

    Args:
        costs: What one task costs.
        microbatches: Of that task.
        entry_s: Time in which its ranks wait for its rows, or their gradient, to change layout.
    """

    costs: StageCosts
    microbatches: int
    entry_s: float = 0.0

    @property
    def passes_s(self) -> PassTimes:
        """Time of a task's passes, with what its ranks wait."""
        back_s = self.costs.backward_s
        return PassTimes(
            self.costs.forward_s + self.entry_s, back_s + self.entry_s if back_s else 0.0
        )

    @property
    def communication_s(self) -> float:
        """Part of it that is exposed communication."""
        ways = 2 if self.costs.backward_s else 1
        return self.costs.communication_s + ways * self.entry_s


def stages_in_plan(
    plan: Plan,
    costs: Mapping[str, tuple[StageCosts, ...]],
    boundaries_s: Mapping[tuple[str, str], float],
) -> dict[Stage, StageInPlan]:
    """Brings costs of stages to what a plan makes of them.

    Where modules share ranks nothing else runs there while rows change their layout, so that the
    tasks of the module that makes them are longer.

    Args:
        plan: The plan.
        costs: Of the stages of every module.
        boundaries_s: Time to bring a task's rows over an edge of the plan.
    """
    waits_s = dict.fromkeys(plan.modules, 0.0)
    for source, destination in plan.edges:
        if shares_ranks(plan, source, destination):
            waits_s[source] += boundaries_s[source, destination]
    found = {}
    for name, stages in costs.items():
        microbatches = task_microbatches(plan, name)
        for number, stage in enumerate(stages):
            is_last = number == len(stages) - 1
            found[Stage(name, number)] = StageInPlan(
                stage, microbatches, waits_s[name] if is_last else 0.0
            )
    return found


def durations(
    plan: Plan,
    stages: Mapping[Stage, StageInPlan],
    boundaries_s: Mapping[tuple[str, str], float],
    *,
    lanes: LaneTimes | None = None,
) -> Durations:
    """Times of tasks and transfers.

    Args:
        plan: The plan.
        stages: Its stages.
        boundaries_s: Time to bring a task's rows over an edge of the plan.
        lanes: What modules that run at the same time make of each other's times.
    """
    tasks_s = {stage: its.passes_s for stage, its in stages.items()}
    transfers_s = {}
    for (name, number), stage in stages.items():
        if number:
            hop_s = stages[Stage(name, number - 1)].costs.hop_s / stage.microbatches
            transfers_s[Edge(name, number - 1, name, number)] = hop_s
    for source, destination in plan.edges:
        if not shares_ranks(plan, source, destination):
            edge = Edge(source, plan.modules[source].num_stages - 1, destination, 0)
            over_s = boundaries_s[source, destination]
            transfers_s[edge] = over_s / task_microbatches(plan, source)
    return Durations(tasks_s, transfers_s, lanes)


def shares_ranks(plan: Plan, source: str, destination: str) -> bool:
    """Whether modules have ranks in common."""
    return not set(plan.modules[source].ranks).isdisjoint(plan.modules[destination].ranks)


def breakdown(plan: Plan, stages: Mapping[Stage, StageInPlan], timeline: Timeline) -> StepBreakdown:
    """Says where a step's time goes on its busiest rank: what that does not work, it waits.

    Where modules run at the same time, it works while any of them does. Communication and
    imbalance are as much of that as they are of the modules' own times.

    Args:
        plan: The plan.
        stages: Its stages.
        timeline: The simulated step, without what happens once in it.
    """
    busiest, sync_s, optimizer_s = (0.0, 0.0, 0.0), 0.0, 0.0
    for kind in rank_kinds(plan):
        hosted = [stages[stage] for stage in kind.stages]
        counts = [plan.num_microbatches / its.microbatches for its in hosted]
        work_s = sum(n * sum(its.passes_s) for n, its in zip(counts, hosted, strict=True))
        sent_s = sum(n * its.communication_s for n, its in zip(counts, hosted, strict=True))
        longer_s = sum(n * its.costs.imbalance_s for n, its in zip(counts, hosted, strict=True))
        if has_lanes(plan):
            together = union_s(timeline, kind) / work_s
            work_s, sent_s, longer_s = (together * it for it in (work_s, sent_s, longer_s))
        busiest = max(busiest, (work_s, sent_s, longer_s))
        sync_s = max(sync_s, sum(its.costs.sync_s for its in hosted))
        optimizer_s = max(optimizer_s, sum(its.costs.optimizer_s for its in hosted))
    busy_s, communication_s, imbalance_s = busiest
    return StepBreakdown(
        compute_s=busy_s - communication_s - imbalance_s,
        imbalance_s=imbalance_s,
        communication_s=communication_s,
        bubble_s=max(timeline.makespan_s - busy_s, 0.0),
        sync_s=sync_s,
        optimizer_s=optimizer_s,
    )


def union_s(timeline: Timeline, kind: RankKind) -> float:
    """Time in which ranks of a kind run any task, however many at the same time."""
    own = timeline.program.tasks_of(kind)
    order = np.argsort(timeline.start_s[own], kind="stable")
    start_s, end_s = timeline.start_s[own][order], timeline.end_s[own][order]
    before_s = np.concatenate(([0.0], np.maximum.accumulate(end_s)[:-1]))
    return float(np.maximum(end_s - np.maximum(start_s, before_s), 0.0).sum())
