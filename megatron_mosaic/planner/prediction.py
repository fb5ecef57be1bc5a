"""What a plan file says of the step that is predicted: its times and memory, also for figures."""

from typing import Any

from megatron_mosaic.cost.cost_model import CostModel
from megatron_mosaic.layout.plan import Plan
from megatron_mosaic.layout.ranks import show_ranks
from megatron_mosaic.planner.estimate import Estimate
from megatron_mosaic.planner.simulated import Simulated
from megatron_mosaic.schedule.graph import rank_kinds
from megatron_mosaic.schedule.lane_notes import lane_notes
from megatron_mosaic.schedule.plan_program import program_of_plan


def prediction(choice: Simulated) -> dict[str, Any]:
    """What a plan file says of a plan's step."""
    breakdown = choice.step.breakdown
    return {
        "step_s": _short(choice.step_s),
        "peak_bytes": round(choice.step.peak_bytes),
        "placement": choice.candidate.placement,
        "breakdown": {
            "compute_s": _short(breakdown.compute_s),
            # Most plans have none.
            **({"imbalance_s": _short(breakdown.imbalance_s)} if breakdown.imbalance_s else {}),
            "communication_s": _short(breakdown.communication_s),
            "bubble_s": _short(breakdown.bubble_s),
            "sync_s": _short(breakdown.sync_s),
            "optimizer_s": _short(breakdown.optimizer_s),
        },
    }


def figure_notes(
    plan: Plan, *, cost_model: CostModel, baseline: Simulated | None
) -> dict[str, Any]:
    """Notes that ``megatron-mosaic show`` draws.

    Args:
        plan: The plan.
        cost_model: What things cost.
        baseline: The best layout that is the same for all modules.
    """
    notes: dict[str, Any] = {
        "capacity_bytes": round(cost_model.cluster.gpu.memory_bytes),
        "peak_flops_per_s": cost_model.cluster.gpu.peak_flops_per_s(cost_model.model.precision),
        **_drawn(plan, cost_model),
    }
    if baseline is not None:
        notes["baseline_step_s"] = _short(baseline.step_s)
        notes["baseline"] = {
            "layout": _layout(baseline.estimate),
            "plan": baseline.plan.layout_notes(),
            **_drawn(baseline.plan, cost_model),
        }
    return notes


def _drawn(plan: Plan, cost_model: CostModel) -> dict[str, Any]:
    """Times and memory of which a figure of a step is made."""
    tasks_s, transfers_s, lanes = cost_model.plan_durations(plan)
    shared = {}
    if lanes is not None:
        shared["lanes"] = lane_notes(
            program_of_plan(plan), tasks_s=tasks_s, transfers_s=transfers_s, lanes=lanes
        )
    return {
        **shared,
        "memory_bytes": _memory(plan, cost_model),
        "tasks_s": {
            f"{stage.module}.{stage.stage}": [_short(time_s) for time_s in times]
            for stage, times in tasks_s.items()
        },
        "transfers_s": {str(edge): _short(time_s) for edge, time_s in transfers_s.items()},
        "task_bytes": {
            f"{name}.{stage}": round(costs.memory.activations_per_task)
            for name, stages in cost_model.plan_stages(plan).items()
            for stage, costs in enumerate(stages)
        },
    }


def _memory(plan: Plan, cost_model: CostModel) -> list[dict[str, Any]]:
    """Terms of every kind of rank."""
    memory = cost_model.plan_memory(plan)
    return [
        {"ranks": show_ranks(kind.ranks)}
        | {term: round(size) for term, size in memory[kind.stages].items()}
        for kind in rank_kinds(plan)
    ]


def _layout(estimate: Estimate) -> str:
    """Sizes of the language model: with a homogeneous layout those of all modules."""
    sizes = estimate.candidate.language
    named = {"TP": sizes.tp, "CP": sizes.cp, "DP": sizes.dp, "PP": sizes.pp, "EP": sizes.ep}
    return " ".join(f"{name}{size}" for name, size in named.items() if size > 1) or "one rank"


def _short(value_s: float) -> float:
    """Six digits, more than any prediction is good for."""
    return float(f"{value_s:.6g}")
