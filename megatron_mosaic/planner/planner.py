"""From a problem to the best plans, the homogeneous one beside them, or what is in the way."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from hashlib import sha256
from time import monotonic
from typing import Any

from megatron_mosaic import __version__
from megatron_mosaic.cluster.cluster_file import write_cluster
from megatron_mosaic.cluster.spec import Cluster
from megatron_mosaic.cost.cost_model import CostModel
from megatron_mosaic.errors import PlanError
from megatron_mosaic.layout.plan import Plan
from megatron_mosaic.model.model_file import write_model
from megatron_mosaic.model.spec import ModelSpec
from megatron_mosaic.planner.estimate import Estimate
from megatron_mosaic.planner.infeasible import refuse
from megatron_mosaic.planner.multiplexing import MAX_TASKS, Multiplexing, multiplexed
from megatron_mosaic.planner.prediction import figure_notes, prediction
from megatron_mosaic.planner.problem import Problem
from megatron_mosaic.planner.rerank import NUM_COMPARED, rerank, with_other_schedules
from megatron_mosaic.planner.search import Found, search
from megatron_mosaic.planner.simulated import Simulated, simulated

_LEAST_TIME = 0.25
"""Share of the time limit that is left for layouts with shared ranks, whatever the rest took."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What the planner answers.

    Args:
        problem: What was asked.
        cost_model: What things cost.
        best: Plans by their simulated step time, the fastest first.
        baseline: The best homogeneous plan; ``None`` if none fits, or none has what is pinned.
        found: What the search in closed form says of itself.
        multiplexing: What came of modules that run at the same time.
    """

    problem: Problem
    cost_model: CostModel
    best: tuple[Simulated, ...]
    baseline: Simulated | None
    found: Found
    multiplexing: Multiplexing

    @property
    def choice(self) -> Simulated:
        """The plan to run."""
        return self.best[0]

    def plan(self) -> Plan:
        """The plan to run, with ranks and notes."""
        plan = self.choice.plan
        return replace(plan, inputs=inputs_of(self.problem), predicted=self._predicted(plan))

    def _predicted(self, plan: Plan) -> dict[str, Any]:
        notes = figure_notes(plan, cost_model=self.cost_model, baseline=self.baseline)
        baseline = notes.pop("baseline", {})
        if self.baseline is not None:
            baseline = {**prediction(self.baseline), **baseline}
        return {**prediction(self.choice), "baseline": baseline, **notes}


def make_plan(
    problem: Problem,
    *,
    cost_model: CostModel | None = None,
    top: int = 3,
    time_limit_s: float | None = None,
    clock: Callable[[], float] = monotonic,
) -> Answer:
    """Finds the best plans.

    Args:
        problem: What is asked.
        cost_model: What things cost; ``None`` is that of the problem's model, cluster and settings.
        top: Plans to return.
        time_limit_s: Ends the search with the best so far; ``None`` is no limit.
        clock: Seconds; tests have their own.

    Raises:
        PlanError: Nothing fits the memory, or nothing has what is pinned.
    """
    start_s = clock()
    cost_model = cost_model or CostModel(problem.model, problem.cluster, problem.settings)
    found = search(problem, cost_model, top=max(top, NUM_COMPARED), time_limit_s=time_limit_s)
    if not found.best:
        raise refuse(problem, cost_model)
    # The baseline takes part: the answer is never slower than it, by simulation either.
    candidates = list(found.best)
    if found.baseline is not None and found.baseline not in candidates:
        candidates.append(found.baseline)
    entries = rerank(candidates, problem, cost_model, top=top)
    left_s = None
    if time_limit_s is not None:
        left_s = max(time_limit_s - (clock() - start_s), _LEAST_TIME * time_limit_s)
    multiplexing = multiplexed(entries, problem, cost_model, time_limit_s=left_s)
    if multiplexing.best is not None and multiplexing.pays:
        entries = [multiplexing.best, *entries]
    if not entries:
        raise _no_schedule(problem, multiplexing, num_layouts=len(candidates))
    return Answer(
        problem=problem,
        cost_model=cost_model,
        best=tuple(entries[:top]),
        baseline=_baseline(found.baseline, problem, cost_model),
        found=found,
        multiplexing=multiplexing,
    )


def _no_schedule(problem: Problem, multiplexing: Multiplexing, *, num_layouts: int) -> PlanError:
    """The error for a schedule that no layout can have."""
    kind = problem.pins.kind
    if kind == "concurrent":
        return PlanError(
            f"set: schedule.kind={kind} must find a layout whose modules share ranks, with quotas "
            f"that the GPU can give and at most {MAX_TASKS} tasks"
            f"{multiplexing.obstacle and '; ' + multiplexing.obstacle}; remove it or pin fewer "
            f"fields"
        )
    return PlanError(
        f"set: schedule.kind={kind} must be possible for one of the {num_layouts} best layouts, "
        f"with a pipeline, encoders on ranks of their own, microbatches that are a multiple of "
        f"its ranks, and layers that divide evenly; remove it or pin such a layout"
    )


def _baseline(
    estimate: Estimate | None, problem: Problem, cost_model: CostModel
) -> Simulated | None:
    """The best homogeneous layout under the fastest schedule that stock arguments can name."""
    if estimate is None:
        return None
    first = simulated(estimate, problem, cost_model)
    schedules = with_other_schedules(first, problem, cost_model, stock=True)
    homogeneous = [entry for entry in schedules if entry.candidate.is_homogeneous]
    return min(homogeneous, key=lambda entry: entry.step_s, default=None)


def inputs_of(problem: Problem) -> dict[str, Any]:
    """What a plan was made from: digests, so that a change shows, and the arguments assumed."""
    settings = problem.settings
    assumed = {
        "--use-distributed-optimizer": settings.distributed_optimizer,
        "--overlap-grad-reduce": settings.overlap_grad_reduce,
        "--overlap-param-gather": settings.overlap_param_gather,
    }
    return {
        "model": model_digest(problem.model),
        "cluster": cluster_digest(problem.cluster),
        "tool": __version__,
        "arguments": [argument for argument, given in assumed.items() if given],
    }


def model_digest(model: ModelSpec) -> str:
    """Tells a model from another, as a plan's inputs note it."""
    return _digest(write_model(model))


def cluster_digest(cluster: Cluster) -> str:
    """Tells a cluster from another, as a plan's inputs note it."""
    return _digest(write_cluster(cluster))


def as_estimates(answer: Answer) -> list[Estimate]:
    """The plans that an explanation compares, under the schedules of the search.

    They are the choice, the next one, and the baseline.
    """
    estimates = [entry.estimate for entry in answer.best[:2]]
    if answer.baseline is not None:
        estimates.append(answer.baseline.estimate)
    return estimates


def _digest(text: str) -> str:
    return f"sha256:{sha256(text.encode()).hexdigest()}"
