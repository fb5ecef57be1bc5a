"""What a plan file carries for figures: memory of every rank, and times to simulate a step with."""

from typing import Any

from megatron_mosaic.layout.plan import Plan
from megatron_mosaic.layout.ranks import show_ranks
from megatron_mosaic.planner.estimate import Estimate
from megatron_mosaic.planner.problem import Problem
from megatron_mosaic.planner.rerank import Simulated, durations
from megatron_mosaic.schedule.graph import rank_kinds


def figure_notes(
    choice: Simulated, *, baseline: Simulated | None, plan: Plan, problem: Problem
) -> dict[str, Any]:
    """Notes that ``megatron-mosaic show`` draws.

    Args:
        choice: The plan's estimate.
        baseline: The best layout that is the same for all modules.
        plan: The plan.
        problem: What was asked.
    """
    tasks_s, transfers_s = durations(choice.estimate)
    notes: dict[str, Any] = {
        "capacity_bytes": round(problem.cluster.gpu.memory_bytes),
        "memory_bytes": _memory(choice.estimate, plan),
        "tasks_s": {
            f"{stage.module}.{stage.stage}": [_short(time_s) for time_s in times]
            for stage, times in tasks_s.items()
        },
        "transfers_s": {str(edge): _short(time_s) for edge, time_s in transfers_s.items()},
        "task_bytes": {
            f"{name}.{stage}": round(costs.memory.activations_per_task)
            for name, hosted in choice.estimate.modules.items()
            for stage, costs in enumerate(hosted.stages)
        },
    }
    if baseline is not None:
        notes["baseline_step_s"] = _short(baseline.step_s)
        notes["baseline"] = {"layout": _layout(baseline.estimate)}
    return notes


def _memory(estimate: Estimate, plan: Plan) -> list[dict[str, Any]]:
    """Terms of every kind of rank; one that hosts less than any estimate has the least of those."""
    bars = []
    for kind in rank_kinds(plan):
        hosting = [
            (len(hosted), terms)
            for hosted, terms in estimate.memory.items()
            if set(map(tuple, kind.stages)) <= set(map(tuple, hosted))
        ]
        _, terms = min(hosting, key=lambda item: item[0])
        sizes = {term: round(size) for term, size in terms.items()}
        bars.append({"ranks": show_ranks(kind.ranks), **sizes})
    return bars


def _layout(estimate: Estimate) -> str:
    """Sizes of the language model: with a homogeneous layout those of all modules."""
    sizes = estimate.candidate.language
    named = {"TP": sizes.tp, "CP": sizes.cp, "DP": sizes.dp, "PP": sizes.pp, "EP": sizes.ep}
    return " ".join(f"{name}{size}" for name, size in named.items() if size > 1) or "one rank"


def _short(value_s: float) -> float:
    """Six digits, more than any prediction is good for."""
    return float(f"{value_s:.6g}")
