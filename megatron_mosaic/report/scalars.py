"""Numbers of a step for a chart over time: of the whole, and of every module."""

from collections.abc import Mapping
from typing import NamedTuple

from megatron_mosaic.layout.plan import Plan
from megatron_mosaic.report.deviation import TERMS, StepTerms, measured_terms
from megatron_mosaic.report.prediction import Prediction
from megatron_mosaic.schedule.graph import Stage, stage_order
from megatron_mosaic.schedule.program import Program
from megatron_mosaic.schedule.simulate import PassTimes


class RankStep(NamedTuple):
    """What one rank measured of a step.

    Args:
        step_s: The whole step.
        walk_s: Until its tasks and transfers were done.
        close_s: Until losses and gradients were reduced.
        busy_s: Time in which it ran tasks.
        passes_s: Of its stages, time in all forward and in all backward tasks.
        memory_bytes: Most memory in use.
        received_bytes: What boundaries brought, by the module that made the rows.
    """

    step_s: float
    walk_s: float
    close_s: float
    busy_s: float
    passes_s: Mapping[Stage, PassTimes]
    memory_bytes: float
    received_bytes: Mapping[str, float]


class Totals(NamedTuple):
    """Numbers of all ranks, by name.

    Args:
        sums: Their sums.
        largest: The largest of any rank.
    """

    sums: Mapping[str, float]
    largest: Mapping[str, float]


def sums_of(plan: Plan, own: RankStep, *, rank: int) -> dict[str, float]:
    """Numbers of one rank that are added up, by names that are the same on every rank."""
    hosted, waits = plan.modules_of(rank), 1 - own.busy_s / own.walk_s if own.walk_s else 0.0
    values = {"bubble": waits if hosted else 0.0}
    for name in plan.modules:
        values[f"{name}/bubble"] = waits if name in hosted else 0.0
        values[f"{name}/bytes"] = own.received_bytes.get(name, 0.0)
    return values


def largest_of(plan: Plan, own: RankStep, *, rank: int) -> dict[str, float]:
    """Numbers of one rank of which the largest counts, by names as above."""
    hosted = plan.modules_of(rank)
    values = {
        "step": own.step_s,
        "walk": own.walk_s,
        "close": own.close_s,
        "busy": own.busy_s,
        "memory": own.memory_bytes if hosted else 0.0,
    }
    for name in plan.modules:
        passes_s = [sum(times) for stage, times in own.passes_s.items() if stage.module == name]
        values[f"{name}/time"] = sum(passes_s)
        values[f"{name}/memory"] = own.memory_bytes if name in hosted else 0.0
    for stage in stage_order(plan):
        forward_s, backward_s = own.passes_s.get(stage, PassTimes(0.0, 0.0))
        values[f"{stage.module}.{stage.stage}/forward"] = forward_s
        values[f"{stage.module}.{stage.stage}/backward"] = backward_s
    return values


def terms_of(plan: Plan, program: Program, totals: Totals) -> StepTerms:
    """Terms of the step that all ranks measured."""
    largest = totals.largest
    return measured_terms(
        plan,
        program,
        step_s=largest["step"],
        walk_s=largest["walk"],
        close_s=max(largest["close"], largest["walk"]),
        busy_s=largest["busy"],
        stages_s=_longest_tasks_s(plan, program, largest),
        modules_s={name: largest[f"{name}/time"] for name in plan.modules},
    )


def scalars_of(
    plan: Plan,
    totals: Totals,
    *,
    terms: StepTerms,
    step_s: float,
    flops: Mapping[str, float],
    prediction: Prediction,
    predicted: StepTerms | None,
) -> dict[str, float]:
    """The numbers by the names of their charts.

    Args:
        plan: The plan.
        totals: What all ranks measured of one step.
        terms: Where the time of that step went.
        step_s: Time of a step, on average.
        flops: Floating-point operations of a step, by module.
        prediction: What the plan predicts.
        predicted: The terms of it, if there are any.
    """
    scalars = {
        **_of_step(plan, totals, terms, step_s=step_s, predicted=predicted),
        **_of_modules(plan, totals, flops=flops, prediction=prediction, predicted=predicted),
    }
    total_flops_per_s = sum(flops.values()) / step_s / plan.world_size
    scalars["tflops-per-gpu"] = total_flops_per_s / 1e12
    if prediction.peak_flops_per_s:
        scalars["mfu"] = total_flops_per_s / prediction.peak_flops_per_s
    scalars["memory-bytes"] = totals.largest["memory"]
    if prediction.memory:
        scalars["memory-bytes-predicted"] = max(bar.total_bytes for bar in prediction.memory)
    return {f"mosaic/{name}": value for name, value in scalars.items()}


def _of_step(
    plan: Plan, totals: Totals, terms: StepTerms, *, step_s: float, predicted: StepTerms | None
) -> dict[str, float]:
    num_working = len({rank for module in plan.modules.values() for rank in module.ranks})
    scalars = {"step-time": step_s, "bubble": totals.sums["bubble"] / num_working}
    scalars |= {f"{term}-time": terms.of(term) for term in TERMS}
    if predicted is not None:
        scalars["step-time-predicted"] = predicted.step_s
        scalars |= {f"{term}-time-predicted": predicted.of(term) for term in TERMS}
    return scalars


def _of_modules(
    plan: Plan,
    totals: Totals,
    *,
    flops: Mapping[str, float],
    prediction: Prediction,
    predicted: StepTerms | None,
) -> dict[str, float]:
    scalars: dict[str, float] = {}
    for name, placement in plan.modules.items():
        num_ranks, time_s = len(placement.ranks), totals.largest[f"{name}/time"]
        own_flops = flops.get(name, 0.0)
        scalars[f"{name}/flops"] = own_flops
        scalars[f"{name}/time"] = time_s
        scalars[f"{name}/bubble"] = totals.sums[f"{name}/bubble"] / num_ranks
        scalars[f"{name}/boundary-bytes"] = totals.sums[f"{name}/bytes"]
        scalars[f"{name}/memory-bytes"] = totals.largest[f"{name}/memory"]
        if prediction.peak_flops_per_s and time_s:
            scalars[f"{name}/mfu"] = own_flops / time_s / num_ranks / prediction.peak_flops_per_s
        if predicted is not None and name in predicted.modules_s:
            scalars[f"{name}/time-predicted"] = predicted.modules_s[name]
    return scalars


def _longest_tasks_s(
    plan: Plan, program: Program, largest: Mapping[str, float]
) -> dict[Stage, PassTimes]:
    """Times of each stage's longest task, from those of all its tasks together."""
    longest: dict[Stage, int] = {}
    for part, count in zip(program.tasks.stage, program.tasks.count, strict=True):
        stage = program.parts[part].stage
        longest[stage] = max(longest.get(stage, 0), int(count))
    return {
        stage: PassTimes(
            *(
                largest[f"{stage.module}.{stage.stage}/{kind}"] * count / plan.num_microbatches
                for kind in ("forward", "backward")
            )
        )
        for stage, count in longest.items()
    }
