"""Chart of the most loaded rank over the mean, by length and method."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter

_COLOURS = {
    "contiguous": "#b5b5b5",
    "zigzag": "#e39a45",
    "lpt": "#8a6fb0",
    "balanced": "#1f7a8c",
}
_FAMILIES = ("EP", "EE", "MP")


def draw_balance(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draws what each method adds to the mean, with the calibrated generator, by ranks."""
    rows = [
        row
        for row in rows
        if (row["generator"], row["tile"]) == ("calibrated", "128x32")
        and row["family"] in _FAMILIES
    ]
    lengths = sorted({row["length"] for row in rows})
    figure = Figure(figsize=(3.0 * len(lengths), 3.0), layout="constrained")
    panels = figure.subplots(1, len(lengths), sharey=True, squeeze=False)[0]
    for axes, length in zip(panels, lengths, strict=True):
        for method, colour in _COLOURS.items():
            ranks = sorted({row["cp"] for row in rows})
            worst = [
                max(
                    row["tiles_worst"]
                    for row in rows
                    if (row["length"], row["method"], row["cp"]) == (length, method, cp)
                )
                for cp in ranks
            ]
            above = [max(ratio - 1, 1e-5) * 100 for ratio in worst]
            axes.plot(ranks, above, color=colour, marker="o", markersize=3, label=method)
        axes.set(xscale="log", yscale="log", xticks=ranks, xlabel="ranks")
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.minorticks_off()
        axes.set_title(f"{length >> 10}k tokens", fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("% that the slowest rank\ncomputes over the mean")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=4, frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)
