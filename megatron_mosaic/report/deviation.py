"""How far a measured step is from the predicted one, and which of its terms is to blame."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from megatron_mosaic.layout.plan import Plan
from megatron_mosaic.report.prediction import Prediction, predicted_timeline
from megatron_mosaic.report.units import seconds
from megatron_mosaic.schedule.graph import Stage
from megatron_mosaic.schedule.lanes import has_lanes
from megatron_mosaic.schedule.program import Program
from megatron_mosaic.schedule.simulate import PassTimes, Timeline, simulate

TERMS = ("compute", "communication", "bubble", "sync", "optimizer", "other")

# A prediction that is so far off is not one to choose plans by.
LARGEST_DEVIATION = 0.2

_ADVICE: Mapping[str, str] = {
    "compute": "measure these devices with megatron-mosaic profile and plan again",
    "communication": "measure these links with megatron-mosaic profile and plan again",
    "bubble": "see who waits for whom: --mosaic-trace DIR, megatron-mosaic show PLAN --trace DIR",
    "sync": "compare the run's arguments with those of inputs.arguments in the plan",
    "optimizer": "compare the run's arguments with those of inputs.arguments in the plan",
    "other": "look at what runs between steps: data, logging, hooks of the script",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class StepTerms:
    """Where the time of a step goes, on the rank that works longest.

    Args:
        step_s: The whole step.
        compute_s: Its tasks, with the tensor- and context-parallel communication inside them.
        communication_s: Waits for transfers between modules and stages, beyond the schedule's.
        bubble_s: Waits that the schedule has, if transfers take no time.
        sync_s: Losses and gradients, reduced after the tasks.
        optimizer_s: From then to the end of the optimizer's step.
        modules_s: Tasks of every module, on its busiest rank.
    """

    step_s: float
    compute_s: float
    communication_s: float
    bubble_s: float
    sync_s: float
    optimizer_s: float
    modules_s: Mapping[str, float] = field(default_factory=dict)

    @property
    def other_s(self) -> float:
        """What is in none of the terms."""
        own = self.compute_s + self.communication_s + self.bubble_s + self.sync_s
        return self.step_s - own - self.optimizer_s

    def of(self, term: str) -> float:
        """Time of one of ``TERMS``."""
        return getattr(self, f"{term}_s")


def predicted_terms(plan: Plan, prediction: Prediction) -> StepTerms | None:
    """Terms of the step that a plan predicts; None where it predicts none."""
    breakdown = prediction.breakdown
    if prediction.step_s is None or not breakdown:
        return None
    inside = ("compute_s", "imbalance_s", "communication_s")
    compute_s = sum(breakdown.get(term, 0.0) for term in inside)
    waits_s = breakdown.get("bubble_s", 0.0)
    timeline = predicted_timeline(plan, prediction) if prediction.tasks_s else None
    communication_s = 0.0
    if timeline is not None:
        communication_s = _transfers_s(
            plan, timeline.program, prediction.tasks_s, walk_s=timeline.makespan_s
        )
    return StepTerms(
        step_s=prediction.step_s,
        compute_s=compute_s,
        communication_s=min(communication_s, waits_s),
        bubble_s=max(waits_s - communication_s, 0.0),
        sync_s=breakdown.get("sync_s", 0.0),
        optimizer_s=breakdown.get("optimizer_s", 0.0),
        modules_s={} if timeline is None else _modules_s(timeline),
    )


def measured_terms(
    plan: Plan,
    program: Program,
    *,
    step_s: float,
    walk_s: float,
    close_s: float,
    busy_s: float,
    stages_s: Mapping[Stage, PassTimes],
    modules_s: Mapping[str, float],
) -> StepTerms:
    """Terms of a step that ran.

    Args:
        plan: The plan.
        program: Its schedule's.
        step_s: The whole step.
        walk_s: Until the last task or transfer of any rank was done.
        close_s: Until losses and gradients were reduced.
        busy_s: Time in tasks of the rank that worked longest.
        stages_s: A stage's longest task, of its slowest replica.
        modules_s: Time in tasks of each module, on its busiest rank.
    """
    transfers_s = _transfers_s(plan, program, stages_s, walk_s=walk_s)
    communication_s = min(transfers_s, max(walk_s - busy_s, 0.0))
    return StepTerms(
        step_s=step_s,
        compute_s=busy_s,
        communication_s=communication_s,
        bubble_s=max(walk_s - busy_s - communication_s, 0.0),
        sync_s=max(close_s - walk_s, 0.0),
        optimizer_s=max(step_s - close_s, 0.0),
        modules_s=modules_s,
    )


def worst_term(predicted: StepTerms, measured: StepTerms) -> str:
    """The term that differs most, in the direction in which the step does."""
    sign = 1.0 if measured.step_s >= predicted.step_s else -1.0
    return max(TERMS, key=lambda term: sign * (measured.of(term) - predicted.of(term)))


def deviation_warning(predicted: StepTerms, measured: StepTerms) -> str | None:
    """One line about a step that is far from its prediction; None where it is not."""
    deviation = measured.step_s / predicted.step_s - 1 if predicted.step_s else 0.0
    if abs(deviation) <= LARGEST_DEVIATION:
        return None
    term = worst_term(predicted, measured)
    times = measured.step_s / predicted.step_s
    compared = f"{times:.3g} times" if times >= 2 else f"{times - 1:+.0%} against"
    return (
        f"a step takes {seconds(measured.step_s)}, {compared} the plan's "
        f"{seconds(predicted.step_s)}; "
        f"most of that is {term}{_worst_module(predicted, measured, term)}: "
        f"{seconds(measured.of(term))} and not {seconds(predicted.of(term))}; {_ADVICE[term]}"
    )


def _worst_module(predicted: StepTerms, measured: StepTerms, term: str) -> str:
    """Of tasks, the module whose tasks differ most."""
    both = predicted.modules_s.keys() & measured.modules_s.keys()
    if term != "compute" or not both:
        return ""
    sign = 1.0 if measured.compute_s >= predicted.compute_s else -1.0
    name = max(
        sorted(both),
        key=lambda name: sign * (measured.modules_s[name] - predicted.modules_s[name]),
    )
    return f", of {name} above all"


def _transfers_s(
    plan: Plan, program: Program, tasks_s: Mapping[Stage, PassTimes], *, walk_s: float
) -> float:
    """What a step of tasks takes longer than it would if transfers took no time."""
    if has_lanes(plan):
        # Tasks that run beside others last longer: nothing tells that from a slow transfer.
        return 0.0
    return max(walk_s - simulate(program, tasks_s=tasks_s).makespan_s, 0.0)


def _modules_s(timeline: Timeline) -> Mapping[str, float]:
    longest_s: dict[str, float] = {}
    for kind in timeline.program.kinds:
        own_s: dict[str, float] = {}
        for task, start_s, end_s in timeline.spans(kind):
            own_s[task.module] = own_s.get(task.module, 0.0) + end_s - start_s
        for name, time_s in own_s.items():
            longest_s[name] = max(longest_s.get(name, 0.0), time_s)
    return longest_s
