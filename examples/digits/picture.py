"""The demo's picture: losses, how far they differ, and one step of each plan as measured."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from examples.digits.training_log import TrainingLog
from examples.digits.verdict import COMPARED_STEPS, LARGEST_DIFFERENCE, relative_differences
from megatron_mosaic.schedule.measured import MeasuredStep

_STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}
# The curves lie on one another: the first is wide and light, the last thin and dark.
_CURVES = (
    {"color": "#b9c6d3", "linewidth": 6.0},
    {"color": "#e39a45", "linewidth": 2.6},
    {"color": "#17406d", "linewidth": 1.0},
)
_COLORS = {
    ("vision", "F"): "#1f7a8c",
    ("vision", "B"): "#a9d6de",
    ("language", "F"): "#d9752b",
    ("language", "B"): "#f6cfa6",
}
_KINDS = {"F": "forward", "B": "backward"}
_LEAST_LABELLED_WIDTH = 0.018  # of the axes


def draw(logs: Mapping[str, TrainingLog], steps: Mapping[str, MeasuredStep], *, path: Path) -> Path:
    """Draws the picture and returns its path.

    Args:
        logs: Logs by the titles of the runs; the others are compared with the first.
        steps: Tasks of one step of each run under a plan, by the titles of the layouts.
        path: PNG to write.
    """
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(11, 3.6 + 2.0 * len(steps)), layout="constrained")
        heights = [1.7, *(1.0 for _ in steps)]
        grid = figure.add_gridspec(len(heights), 2, height_ratios=heights)
        _draw_losses(figure.add_subplot(grid[0, 0]), logs)
        _draw_differences(figure.add_subplot(grid[0, 1]), logs)
        longest_ms = max(step.makespan_s for step in steps.values()) * 1000
        for row, (title, step) in enumerate(steps.items(), start=1):
            axes = figure.add_subplot(grid[row, :])
            axes.set_xlim(0, longest_ms)
            _draw_step(axes, step, title=title)
        axes.set_xlabel("milliseconds since the first task of the step began")
        _add_task_legend(figure)
        figure.savefig(path, dpi=150)
    return path


def _draw_losses(axes: Axes, logs: Mapping[str, TrainingLog]) -> None:
    for curve, (title, log) in zip(_CURVES, logs.items(), strict=True):
        axes.plot(range(1, len(log.losses) + 1), log.losses, label=title, **curve)
    axes.set_yscale("log")
    axes.set_title("Training loss")
    axes.set_xlabel("step")
    axes.legend()


def _draw_differences(axes: Axes, logs: Mapping[str, TrainingLog]) -> None:
    """Plots what the layouts change; losses that are equal to all printed digits are left out."""
    (reference, log), *others = logs.items()
    for curve, (title, other) in zip(_CURVES[1:], others, strict=True):
        differences = relative_differences(other, log)
        steps = [step for step, part in enumerate(differences, start=1) if part > 0]
        parts = [part for part in differences if part > 0]
        axes.plot(steps, parts, ".", markersize=3, color=curve["color"], label=title)
    axes.plot(
        (1, COMPARED_STEPS),
        (LARGEST_DIFFERENCE,) * 2,
        color="#b03030",
        linewidth=1.2,
        label="allowed",
    )
    axes.set_yscale("log")
    axes.set_title(f"Loss difference from {reference}, relative to the first loss")
    axes.set_xlabel("step")
    axes.legend()


def _draw_step(axes: Axes, step: MeasuredStep, *, title: str) -> None:
    """Draws a row of tasks for each rank; the numbers are the microbatches of a task."""
    for rank, spans in step.spans.items():
        for task, start_s, end_s in spans:
            start_ms, width_ms = start_s * 1000, (end_s - start_s) * 1000
            color = _COLORS[task.module, task.kind]
            axes.barh(
                rank, width_ms, left=start_ms, height=0.8, color=color, edgecolor="white", lw=0.5
            )
            if width_ms > _LEAST_LABELLED_WIDTH * axes.get_xlim()[1]:
                axes.text(
                    start_ms + width_ms / 2,
                    rank,
                    ",".join(map(str, task.microbatches)),
                    ha="center",
                    va="center",
                    fontsize=7,
                    color="white" if task.kind == "F" else "#333333",
                )
    axes.set_yticks(list(step.spans), [f"rank {rank}" for rank in step.spans])
    axes.invert_yaxis()
    axes.set_title(f"{title}, {step.makespan_s * 1000:.0f} ms")


def _add_task_legend(figure: Figure) -> None:
    figure.legend(
        handles=[
            Patch(color=color, label=f"{module} {_KINDS[kind]}")
            for (module, kind), color in _COLORS.items()
        ],
        title="one step as measured; numbers are microbatches",
        loc="outside lower center",
        ncols=len(_COLORS),
    )
