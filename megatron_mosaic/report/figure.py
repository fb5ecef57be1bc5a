"""A plan as a picture: memory of its ranks, where the time goes, and a step of the schedule."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure

from megatron_mosaic.layout.plan import Plan
from megatron_mosaic.report.lanes import quotas
from megatron_mosaic.report.palette import MEMORY_COLORS, TIME_COLORS
from megatron_mosaic.report.prediction import (
    MEMORY_TERMS,
    TIME_TERMS,
    Memory,
    Prediction,
    predicted_timeline,
    read_baseline,
    read_prediction,
)
from megatron_mosaic.report.summary import in_brackets
from megatron_mosaic.report.timeline import draw_timelines, timeline_height
from megatron_mosaic.report.units import gib, seconds
from megatron_mosaic.schedule.simulate import Timeline

_STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "text.parse_math": False,  # a dollar in a plan is a dollar
}
_WIDTH = 11.0  # inches
_MOST_BARS = 16
_AROUND = 1.0  # inches of a panel above and below its axes


def draw_plan(plan: Plan, path: Path) -> None:
    """Draws a plan, and a step of its baseline; without a prediction only the schedule.

    Args:
        plan: The plan.
        path: Picture to write, of the kind that the name ends with.
    """
    prediction = read_prediction(plan)
    timelines = _timelines(plan, prediction)
    bars = _fullest(prediction)
    tops = bool(bars) + bool(prediction.breakdown)
    top_height = _AROUND + max(1.1, 0.26 * len(bars)) if tops else 0.0
    heights = [top_height, sum(map(timeline_height, timelines.values()))]
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH, sum(heights)), layout="constrained")
        bottom: Figure | SubFigure = figure
        if tops:
            grid = figure.add_gridspec(2, 1, height_ratios=heights, hspace=0.04)
            bottom = figure.add_subfigure(grid[1])
            axes = figure.add_subfigure(grid[0]).subplots(1, tops, squeeze=False)[0]
            if bars:
                _draw_memory(axes[0], prediction, bars, height=top_height - _AROUND)
            if prediction.breakdown:
                _draw_breakdown(axes[-1], prediction, height=top_height - _AROUND)
        draw_timelines(bottom, timelines, predicted=bool(prediction.tasks_s), quotas=quotas(plan))
        figure.savefig(path, dpi=150)


def _timelines(plan: Plan, prediction: Prediction) -> Mapping[str, Timeline]:
    """The steps to draw by the names of their layouts: the plan's, and the baseline's if known."""
    timelines = {"": predicted_timeline(plan, prediction)}
    baseline = read_baseline(plan)
    if baseline is not None and prediction.tasks_s:
        name = f"the best homogeneous layout{in_brackets(prediction.baseline_layout)}"
        timelines[name] = predicted_timeline(*baseline)
    return timelines


def _fullest(prediction: Prediction) -> list[Memory]:
    """Memory bars to draw: all, or the fullest ones in the order of the plan."""
    fullest = sorted(prediction.memory, key=lambda bar: -bar.total_bytes)[:_MOST_BARS]
    return [bar for bar in prediction.memory if bar in fullest]


def _draw_memory(
    axes: Axes, prediction: Prediction, bars: Sequence[Memory], *, height: float
) -> None:
    scale = 1 / 2**30
    ends = [0.0] * len(bars)
    places = range(len(bars))
    for term in MEMORY_TERMS:
        sizes = [bar.terms.get(term, 0.0) * scale for bar in bars]
        if any(sizes):
            axes.barh(places, sizes, left=ends, height=0.7, color=MEMORY_COLORS[term], label=term)
        ends = [end + size for end, size in zip(ends, sizes, strict=True)]
    for place, bar in zip(places, bars, strict=True):
        text = axes.text(ends[place], place, f" {gib(bar.total_bytes)}", va="center", fontsize=8)
        # The line of the capacity may be just there.
        text.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.5})
    longest = max(ends)
    title = "Memory of a GPU, GiB"
    if prediction.capacity_bytes:
        capacity = prediction.capacity_bytes * scale
        longest = max(longest, capacity)
        axes.axvline(capacity, color="#b03030", linewidth=1.2)
        title += f" (line: it has {gib(prediction.capacity_bytes)})"
    # Room for the number at the end of the longest bar.
    axes.set_xlim(0, longest * 1.18)
    axes.set_yticks(places, [_wrapped(f"ranks {bar.ranks}") for bar in bars])
    axes.set_ylim(len(bars) - 0.4, -0.6)
    axes.set_title(title)
    hidden = len(prediction.memory) - len(bars)
    _legend_below(axes, height=height, title=f"{hidden} emptier ones left out" if hidden else None)


def _draw_breakdown(axes: Axes, prediction: Prediction, *, height: float) -> None:
    rows: list[tuple[str, Mapping[str, float]]] = [("plan", prediction.breakdown)]
    if prediction.baseline_breakdown:
        label = _wrapped(f"baseline {prediction.baseline_layout}".strip())
        rows.append((label, prediction.baseline_breakdown))
    totals_s = [sum(terms.values()) for _, terms in rows]
    longest_s = max(totals_s) or 1.0
    ends = [0.0] * len(rows)
    for term in TIME_TERMS:
        sizes = [terms.get(term, 0.0) for _, terms in rows]
        name = term.removesuffix("_s")
        if any(sizes):
            axes.barh(
                range(len(rows)), sizes, left=ends, height=0.6, color=TIME_COLORS[term], label=name
            )
        for place, size in enumerate(sizes):
            if size > 0.14 * longest_s:  # as wide as the number is
                middle = ends[place] + size / 2
                color = "#333333" if term == "bubble_s" else "white"
                text = seconds(size)
                axes.text(middle, place, text, ha="center", va="center", fontsize=8, color=color)
        ends = [end + size for end, size in zip(ends, sizes, strict=True)]
    for place, total_s in enumerate(totals_s):
        axes.text(total_s, place, f" {seconds(total_s)}", va="center", fontsize=8)
    axes.set_xlim(0, longest_s * 1.15)
    axes.set_yticks(range(len(rows)), [label for label, _ in rows])
    # In a high panel the bars stay at its top, no thicker than half an inch.
    axes.set_ylim(max(len(rows), height / 0.6) - 0.4, -0.6)
    axes.set_title("Where the time of a step goes, seconds")
    _legend_below(axes, height=height)


def _legend_below(axes: Axes, *, height: float, title: str | None = None) -> None:
    """Adds a legend a third of an inch below axes of a height, where their numbers end."""
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(
        handles,
        labels,
        loc="upper center",
        bbox_to_anchor=(0.5, -0.24 / height),
        ncols=len(labels),
        handlelength=1.0,
        columnspacing=1.0,
        fontsize=8,
        title=title,
        title_fontsize=8,
    )


def _wrapped(label: str) -> str:
    return "\n".join(textwrap.wrap(label, 22, max_lines=3, placeholder=" ...")) or label
