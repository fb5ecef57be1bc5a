"""What the planner expects of a plan, read from the plan's ``predicted``."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from megatron_mosaic.errors import PlanError
from megatron_mosaic.fields import mapping, show
from megatron_mosaic.layout.plan import Plan
from megatron_mosaic.schedule.graph import Stage, stage_order
from megatron_mosaic.schedule.lane_notes import noted_lanes
from megatron_mosaic.schedule.lanes import has_lanes
from megatron_mosaic.schedule.plan_program import program_of_plan
from megatron_mosaic.schedule.simulate import LaneTimes, PassTimes, Timeline, simulate
from megatron_mosaic.schedule.steps import edges_of

MEMORY_TERMS = ("weights", "gradients", "optimizer", "activations", "working", "buffers")
TIME_TERMS = (
    "compute_s",
    "imbalance_s",
    "communication_s",
    "bubble_s",
    "sync_s",
    "optimizer_s",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """Memory of ranks that hold the same.

    Args:
        ranks: The ranks, as the plan writes them.
        terms: Bytes by term, in the order of ``MEMORY_TERMS``.
    """

    ranks: str
    terms: Mapping[str, float]

    @property
    def total_bytes(self) -> float:
        """All terms."""
        return sum(self.terms.values())

    def holds(self, rank: int) -> bool:
        """Whether a rank is one of them."""
        spans = (span.partition("-") for span in re.findall(r"\d+(?:-\d+)?", self.ranks))
        return any(int(first) <= rank <= int(last or first) for first, _, last in spans)


@dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """A prediction; what the plan does not say is empty or None.

    Args:
        step_s: Time of a step.
        breakdown: Seconds by term, in the order of ``TIME_TERMS``.
        baseline_step_s: Of the best layout that is the same for all modules.
        baseline_breakdown: Its terms.
        baseline_layout: What it is, for people.
        memory: Of every kind of rank.
        capacity_bytes: Memory of a GPU.
        tasks_s: Times of every stage's tasks; empty where one is missing.
        transfers_s: Times of a microbatch, by the text of the edge.
        task_bytes: Activations of a stage's longest task, from its forward to its backward pass;
            empty where one is missing.
        lanes: What modules that run at the same time make of each other's times; None where they
            take turns, or nothing is known of it.
        peak_flops_per_s: Peak of a GPU in the model's precision.
    """

    step_s: float | None
    breakdown: Mapping[str, float]
    baseline_step_s: float | None
    baseline_breakdown: Mapping[str, float]
    baseline_layout: str
    memory: tuple[Memory, ...]
    capacity_bytes: float | None
    tasks_s: Mapping[Stage, PassTimes]
    transfers_s: Mapping[str, float]
    task_bytes: Mapping[Stage, float]
    lanes: LaneTimes | None = None
    peak_flops_per_s: float | None = None


class Baseline(NamedTuple):
    """The best homogeneous layout.

    Args:
        plan: Its plan.
        prediction: What is expected of it.
    """

    plan: Plan
    prediction: Prediction


def read_prediction(plan: Plan) -> Prediction:
    """Reads a plan's prediction.

    Raises:
        PlanError: Something in ``predicted`` is not of the form that the planner writes.
    """
    written = plan.predicted or {}
    baseline = mapping("predicted.baseline", written.get("baseline", {}))
    bars = written.get("memory_bytes", [])
    if not isinstance(bars, list):
        raise _error("memory_bytes", bars, "be a list with an entry for every kind of rank")
    return Prediction(
        step_s=_optional("step_s", written),
        breakdown=_terms("breakdown", written.get("breakdown", {}), TIME_TERMS),
        baseline_step_s=_optional("baseline_step_s", written),
        baseline_breakdown=_terms("baseline.breakdown", baseline.get("breakdown", {}), TIME_TERMS),
        baseline_layout=str(baseline.get("layout", "")),
        memory=tuple(_memory(f"memory_bytes[{n}]", bar) for n, bar in enumerate(bars)),
        capacity_bytes=_optional("capacity_bytes", written),
        tasks_s=_tasks_s(plan, written.get("tasks_s", {}), field="tasks_s"),
        transfers_s=_numbers("transfers_s", written.get("transfers_s", {})),
        task_bytes=_of_stages(plan, _numbers("task_bytes", written.get("task_bytes", {}))),
        lanes=_lanes(plan, mapping("predicted.lanes", written.get("lanes", {}))),
        peak_flops_per_s=_optional("peak_flops_per_s", written),
    )


def read_baseline(plan: Plan) -> Baseline | None:
    """Reads the homogeneous plan that stands in a plan's prediction, with a prediction of its own.

    Returns:
        The two; ``None`` where the file does not tell the times of the baseline's tasks.

    Raises:
        PlanError: It is not of the form that the planner writes.
        LayoutError: Its parts contradict each other.
    """
    notes = mapping("predicted.baseline", (plan.predicted or {}).get("baseline", {}))
    if "plan" not in notes:
        return None
    where = "predicted.baseline.plan"
    homogeneous = plan.with_layout(mapping(where, notes["plan"]), where=where)
    own = {key: notes[key] for key in notes if key != "plan"}
    try:
        prediction = read_prediction(replace(homogeneous, predicted=own))
    except PlanError as error:
        raise PlanError(f"predicted.baseline: {error}") from None
    return Baseline(homogeneous, prediction) if prediction.tasks_s else None


def predicted_timeline(plan: Plan, prediction: Prediction) -> Timeline:
    """Simulates a step with the predicted times.

    Where there are none a forward pass of a microbatch takes 1 s, a backward pass 2 s.
    """
    tasks_s = prediction.tasks_s
    if not tasks_s:
        program = program_of_plan(plan)
        counts = dict.fromkeys(program.stages, 1)
        for stage, count in zip(program.tasks.stage, program.tasks.count, strict=True):
            counts[program.stages[stage]] = max(counts[program.stages[stage]], int(count))
        tasks_s = {stage: PassTimes(count, 2.0 * count) for stage, count in counts.items()}
    transfers_s = {edge: prediction.transfers_s.get(str(edge), 0.0) for edge in edges_of(plan)}
    lanes = prediction.lanes if prediction.tasks_s else None
    return simulate(program_of_plan(plan), tasks_s=tasks_s, transfers_s=transfers_s, lanes=lanes)


def _memory(field: str, written: Any) -> Memory:
    bar = mapping(f"predicted.{field}", written)
    terms = {name: value for name, value in bar.items() if name != "ranks"}
    return Memory(ranks=str(bar.get("ranks", "")), terms=_terms(field, terms, MEMORY_TERMS))


def _terms(field: str, written: Any, names: tuple[str, ...]) -> Mapping[str, float]:
    """Numbers by name, in the order of the names."""
    found = _numbers(field, written)
    for name in found:
        if name not in names:
            raise _error(f"{field}.{name}", found[name], f"be one of {', '.join(names)}")
    return {name: found[name] for name in names if name in found}


def _tasks_s(plan: Plan, written: Any, *, field: str) -> Mapping[Stage, PassTimes]:
    times: dict[str, PassTimes] = {}
    for name, pair in mapping(f"predicted.{field}", written).items():
        if not isinstance(pair, list) or len(pair) != 2:
            raise _error(f"{field}.{name}", pair, "be the times of a forward and a backward pass")
        times[str(name)] = PassTimes(*(_number(f"{field}.{name}", value) for value in pair))
    return _of_stages(plan, times)


def _lanes(plan: Plan, written: Mapping[Any, Any]) -> LaneTimes | None:
    shared_s = _tasks_s(plan, written.get("tasks_s", {}), field="lanes.tasks_s")
    slowdown: dict[str, tuple[float, ...]] = {}
    for names, factors in mapping("predicted.lanes.slowdown", written.get("slowdown", {})).items():
        field = f"lanes.slowdown.{names}"
        if not isinstance(factors, list) or len(factors) != len(str(names).split(" + ")):
            raise _error(field, factors, "be a list with a number for every pass of its name")
        slowdown[str(names)] = tuple(_number(field, factor) for factor in factors)
        if min(factors) < 1:
            raise _error(field, factors, "be numbers >= 1")
    return noted_lanes(shared_s, slowdown) if shared_s and has_lanes(plan) else None


def _of_stages[T](plan: Plan, written: Mapping[str, T]) -> Mapping[Stage, T]:
    """What is written of stages, by stage; nothing if it is not written of all."""
    stages = {f"{stage.module}.{stage.stage}": stage for stage in stage_order(plan)}
    if not stages.keys() <= written.keys():
        return {}
    return {stage: written[name] for name, stage in stages.items()}


def _numbers(field: str, written: Any) -> dict[str, float]:
    pairs = mapping(f"predicted.{field}", written)
    return {str(name): _number(f"{field}.{name}", value) for name, value in pairs.items()}


def _optional(field: str, written: Mapping[str, Any]) -> float | None:
    value = written.get(field)
    return None if value is None else _number(field, value)


def _number(field: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
        raise _error(field, value, "be a number >= 0")
    return float(value)


def _error(field: str, value: Any, rule: str) -> PlanError:
    return PlanError(
        f"predicted.{field}={show(value)} must {rule}; plan again, or remove the key predicted"
    )
