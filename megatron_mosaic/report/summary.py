"""Why a plan is as fast as it is, in a sentence, and its numbers in a few words."""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from megatron_mosaic.report.prediction import TIME_TERMS, Prediction
from megatron_mosaic.report.step import Measured, ReportedStep
from megatron_mosaic.report.units import gib, ranks_text, seconds

_LEAST_SHARE = 0.002  # of a step: what is less is not worth a word
_NAMES: Mapping[str, str] = {
    "compute_s": "computing",
    "imbalance_s": "imbalance of tokens and items",
    "communication_s": "exposed communication",
    "bubble_s": "waiting",
    "sync_s": "synchronising",
    "optimizer_s": "the optimizer",
}


class Number(NamedTuple):
    """A number that the report shows large.

    Args:
        label: What it is.
        value: With its unit.
        note: What to compare it with.
    """

    label: str
    value: str
    note: str = ""


def summary(prediction: Prediction, step: ReportedStep) -> str:
    """Says in words what a plan gains over the homogeneous baseline, and by what."""
    step_s, other_s = prediction.step_s, prediction.baseline_step_s
    if step_s is None and step.measured is not None:
        measured = seconds(step.measured.makespan_s)
        return f"The tasks of a measured step take {measured}; the plan file predicts no time."
    if step_s is None:
        return "The plan file predicts no time of a step, so there is nothing to compare it with."
    if other_s is None or not step_s:
        return f"A step takes {seconds(step_s)}; the plan file names no baseline."
    name = f"the best homogeneous layout{in_brackets(prediction.baseline_layout)}"
    if abs(other_s - step_s) < _LEAST_SHARE * step_s:
        return f"A step takes {seconds(step_s)}, as long as under {name}."
    text = f"A step takes {seconds(step_s)}, {other_s / step_s:.2f} times as fast as under {name}"
    gained, paid = _changes(prediction)
    text += f": it saves {_listed(gained)}" if gained else ""
    text += f", and pays {_listed(paid)}" if gained and paid else ""
    return f"{text}."


def key_numbers(prediction: Prediction, step: ReportedStep) -> Iterator[Number]:
    """Yields the numbers that stand at the top of a report."""
    step_s, other_s = prediction.step_s, prediction.baseline_step_s
    if step_s is not None:
        yield Number("step, predicted", seconds(step_s))
    if step_s and other_s is not None:
        note = f"baseline: {seconds(other_s)} a step"
        yield Number("against homogeneous", f"{other_s / step_s:.2f}×", note)
    if step.measured is not None:
        yield _measured_number(step, step.measured)
    timeline = step.timeline
    least_s = min(map(timeline.bubble_s, timeline.program.kinds), default=0.0)
    note = f"of the tasks' time; the busiest, which the breakdown is of, {seconds(least_s)}"
    yield Number("ranks wait, on average", f"{waiting_share(step):.1%}", note)
    if prediction.memory:
        fullest = max(prediction.memory, key=lambda bar: bar.total_bytes)
        of = f" of {gib(prediction.capacity_bytes)}" if prediction.capacity_bytes else ""
        yield Number("fullest GPU", gib(fullest.total_bytes), f"{ranks_text(fullest.ranks)}{of}")


def waiting_share(step: ReportedStep) -> float:
    """Share of a simulated step in which ranks that host something wait, on average.

    The bubble of a breakdown is less: it is what the busiest rank waits.
    """
    timeline = step.timeline
    kinds = timeline.program.kinds
    total_s = timeline.makespan_s * sum(len(kind.ranks) for kind in kinds)
    waits_s = sum(timeline.bubble_s(kind) * len(kind.ranks) for kind in kinds)
    return waits_s / total_s if total_s else 0.0


def _measured_number(step: ReportedStep, measured: Measured) -> Number:
    simulated_s = step.timeline.makespan_s
    note = f"step {measured.step}, the typical one of {len(measured.steps_s)}"
    if step.source != "example" and simulated_s:
        error = measured.makespan_s / simulated_s - 1
        note += f"; simulated {seconds(simulated_s)}, measured {error:+.1%}"
    return Number("tasks, measured", seconds(measured.makespan_s), note)


def _changes(prediction: Prediction) -> tuple[list[str], list[str]]:
    """Terms that the plan has less of than the baseline, and those that it has more of."""
    if not prediction.breakdown or not prediction.baseline_breakdown:
        return [], []
    less_s = {
        term: prediction.baseline_breakdown.get(term, 0.0) - prediction.breakdown.get(term, 0.0)
        for term in TIME_TERMS
    }
    least_s = _LEAST_SHARE * (prediction.step_s or 0.0)
    by_size = sorted(less_s.items(), key=lambda item: -abs(item[1]))
    words = [(value, f"{seconds(abs(value))} of {_NAMES[term]}") for term, value in by_size]
    gained = [text for value, text in words if value > least_s]
    return gained, [text for value, text in words if value < -least_s]


def _listed(parts: list[str]) -> str:
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def in_brackets(text: str) -> str:
    """Text in brackets, with a space before them; nothing if it is empty."""
    return f" ({text})" if text else ""
