"""Draws estimates beside published times."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt

if TYPE_CHECKING:
    from benchmarks.cost_accuracy import Row

_COLOURS = {
    "simumax": "#1b6ca8",
    "a100-2205.05198": "#111111",
    "bridge-dense": "#2a9d4a",
    "bridge-moe": "#e07b00",
    "bridge-lora": "#7a4fb5",
    "cards": "#c9a100",
    "recipes": "#c0392b",
    "nemo-cp": "#8c6d4f",
    "vlm": "#d6458b",
    "automodel": "#999999",
}


def draw(rows: Sequence["Row"], path: Path) -> None:
    """Draws one dot for each row: filled where its half was fitted, hollow elsewhere."""
    figure, axes = plt.subplots(figsize=(7, 6.5), layout="constrained")
    ends = [min(row.published_s for row in rows) / 1.5, max(row.published_s for row in rows) * 1.5]
    axes.fill_between(ends, [x * 0.8 for x in ends], [x * 1.2 for x in ends], color="#eeeeee")
    axes.plot(ends, ends, color="#777777", linewidth=0.8)
    for source, colour in _COLOURS.items():
        same = [row for row in rows if row.case.source == source]
        for half, face in (("A", colour), ("", "none")):
            part = [row for row in same if (row.half == "A") == (half == "A")]
            axes.scatter(
                [row.published_s for row in part],
                [row.estimate.step_s for row in part],
                s=26,
                facecolors=face,
                edgecolors=colour,
                linewidths=1.1,
                label=f"{source} ({len(same)})" if half == "A" and same else None,
                zorder=3,
            )
    axes.set(xscale="log", yscale="log", xlim=ends, ylim=ends)
    axes.set_xlabel("published step, s")
    axes.set_ylabel("estimated step, s")
    axes.set_title("Cost model and published steps; band: 20 %; filled: fitted half", fontsize=10)
    axes.legend(fontsize=8, frameon=False, loc="upper left")
    figure.savefig(path, dpi=130)
    plt.close(figure)
