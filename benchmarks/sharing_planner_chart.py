"""Chart of samples per second by model family, GPUs, and what the planner may do."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

_PLANS = {
    "homogeneous_s": ("homogeneous", "#b5b5b5"),
    "temporal_s": ("one module at a time", "#e39a45"),
    "step_s": ("at the same time where it pays", "#1f7a8c"),
}


def draw_sharing(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draws throughput over that of one module at a time, on H200s."""
    rows = [row for row in rows if row["cluster"] == "h200"]
    models = list(dict.fromkeys(row["model"] for row in rows))
    figure = Figure(figsize=(2.6 * len(models), 2.9), layout="constrained")
    panels = figure.subplots(1, len(models), sharey=True, squeeze=False)[0]
    for axes, name in zip(panels, models, strict=True):
        own = [row for row in rows if row["model"] == name]
        for place, (field, (label, colour)) in enumerate(_PLANS.items()):
            heights = [row["temporal_s"] / row[field] if row[field] else 0.0 for row in own]
            positions = [column + 0.27 * (place - 1) for column in range(len(own))]
            axes.bar(positions, heights, width=0.25, color=colour, label=label)
        axes.set_xticks(range(len(own)), [str(row["num_gpus"]) for row in own])
        axes.set(title=name, xlabel="H200s")
        axes.title.set_fontsize(9)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("predicted samples/s over those\nof one module at a time")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=3, frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)
