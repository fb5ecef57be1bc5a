"""Draws simulated beside measured steps, and the engine beside upstream's schedules.

python -m benchmarks.fidelity_chart
"""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.machine import RESULTS, read_results

_SIMULATED, _MEASURED, _UPSTREAM = "#b9c6d3", "#1f7a8c", "#d9752b"


def draw(path: Path) -> Path:
    """Draws the results that were written, and returns the picture's path."""
    fidelity = read_results("schedule_fidelity")["plans"]
    races = read_results("upstream_schedules")["plans"]
    figure = Figure(figsize=(9, 1.6 + 0.36 * (len(fidelity) + len(races))), layout="constrained")
    above, below = figure.subplots(2, 1, height_ratios=[len(fidelity) + 1, len(races) + 1])
    _draw_bars(above, fidelity, {"simulated": "predicted_s", "measured": "measured_s"})
    above.set_title("A step on eight ranks, simulated and measured", loc="left", weight="bold")
    _draw_bars(below, races, {"upstream": "upstream_s", "Mosaic": "mosaic_s"})
    below.set_title("Mosaic's engine and upstream's schedules", loc="left", weight="bold")
    below.set_xlabel("seconds")
    figure.savefig(path, dpi=130)
    return path


def _draw_bars(axes: Axes, rows: list[dict[str, Any]], series: dict[str, str]) -> None:
    """Draws two bars a row, and how much longer the second one is."""
    colors = {"upstream": _UPSTREAM, "simulated": _SIMULATED}
    places = np.arange(len(rows), dtype=float)
    for offset, (label, key) in zip((-0.2, 0.2), series.items(), strict=True):
        widths = [row[key] for row in rows]
        axes.barh(places + offset, widths, 0.38, label=label, color=colors.get(label, _MEASURED))
    first, second = series.values()
    for place, row in zip(places, rows, strict=True):
        change = row[second] / row[first] - 1
        axes.text(max(row[first], row[second]) + 0.02, place, f"{change:+.1%}", va="center")
    axes.set_yticks(places, [row["plan"] for row in rows])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.12 * max(row[key] for row in rows for key in series.values()))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)


if __name__ == "__main__":
    print(draw(RESULTS / "schedule_fidelity.png"))
