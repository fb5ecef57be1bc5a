"""Picture of the parts that have run: rates by SM count, gains of arms, gaps."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.sharing.results import Results, rows_of

_COLOURS = {"matmul": "#1f7a8c", "attention": "#e39a45", "elementwise": "#8a6fb0"}
_ARM_COLOURS = {"A": "#8f8f8f", "B": "#b9a27a", "C": "#e39a45", "D": "#1f7a8c",
                "E": "#5fb0bf", "F": "#2f4858", "G": "#8a6fb0"}  # fmt: skip
_GAP_COLOURS = {"serial": "#8f8f8f", "streams": "#b9a27a", "priority": "#e39a45", "cap": "#1f7a8c"}


def draw(results: Results, path: Path) -> Path:
    """Draws what there is: a panel for each of the parts p1, p4 and p5 that has rows."""
    panels = [
        (height, panel, rows)
        for part, panel, height in (
            ("p1", _curves, lambda rows: 3.2),
            ("p4", _gains, lambda rows: 0.9 + 0.16 * sum(len(row["arms"]) + 2 for row in rows)),
            ("p5", _gaps, lambda rows: 2.8),
        )
        if (rows := _shown(part, results))
        for height in [height(rows)]
    ]
    heights = [height for height, _, _ in panels] or [1.0]
    figure = Figure(figsize=(8.5, sum(heights)), layout="constrained")
    axes = figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
    for own, (_, panel, rows) in zip(axes, panels, strict=False):
        panel(own, rows)
        own.spines[["top", "right"]].set_visible(False)
    if not panels:
        axes[0].set_axis_off()
        axes[0].text(0.5, 0.5, "nothing measured yet", ha="center", va="center")
    figure.savefig(path, dpi=150)
    return path


def _shown(part: str, results: Results) -> list[Mapping[str, Any]]:
    """Rows with something to draw."""
    ran = [row for row in rows_of(results, part) if not {"skipped", "failed"} & row.keys()]
    return [row for row in ran if part != "p5" or row["recovered"] is not None]


def _curves(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    """Rate of each operation over that on the whole GPU."""
    whole = max(row["sms"] for row in rows)
    labelled = set()
    for name in dict.fromkeys(row["operation"] for row in rows):
        own = sorted((row for row in rows if row["operation"] == name), key=lambda row: row["sms"])
        kind, last = own[0]["kind"].partition(".")[0], own[-1]
        if last["sms"] != whole:
            continue
        axes.plot(
            [row["sms"] for row in own],
            [last["median_s"] / row["median_s"] for row in own],
            color=_COLOURS[kind],
            linewidth=1,
            marker="o",
            markersize=2.5,
            label=None if kind in labelled else kind,
        )
        labelled.add(kind)
    axes.plot([0, whole], [0, 1], color="#cccccc", linewidth=1, linestyle=":", zorder=0)
    axes.set(xlabel="SMs", ylabel="rate, of the whole GPU's", ylim=(0, 1.15), xlim=(0, None))
    axes.set_title("operations alone on some SMs", fontsize=9, loc="left")
    axes.legend(frameon=False, fontsize=8)


def _gains(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    """Gain of every arm with its interval; a line for what overlap could give at best."""
    place, ticks, names = 0.0, [], []
    for row in rows:
        axes.text(1.0, place, row["case"], fontsize=8, weight="bold", va="center")
        place += 1
        first = place
        for name, arm in row["arms"].items():
            if not arm.get("gain"):
                continue
            gain = arm["gain"]
            off = [[gain["estimate"] - gain["low"]], [gain["high"] - gain["estimate"]]]
            axes.barh(place, gain["estimate"] - 1, left=1, height=0.8, xerr=off,
                      color=_ARM_COLOURS[name[0]], error_kw={"linewidth": 0.7})  # fmt: skip
            ticks.append(place)
            names.append(name)
            place += 1
        ends = [first - 0.5, place - 0.5]
        axes.plot([row["ideal_gain"]] * 2, ends, color="#c0392b", linewidth=1)
        place += 1
    axes.axvline(1, color="black", linewidth=0.7)
    axes.set_yticks(ticks, names, fontsize=6)
    axes.invert_yaxis()
    axes.set_xlabel("step of the best serial arm over that of the arm; red: perfect overlap")
    axes.set_title(_where(rows), fontsize=9, loc="left")


def _where(rows: Sequence[Mapping[str, Any]]) -> str:
    host = any(row["on_host"] for row in rows)
    return "whole steps" + (" (dry run on a host: lanes take turns)" if host else "")


def _gaps(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    """Share of each gap that was filled."""
    for arm, colour in _GAP_COLOURS.items():
        own = [row for row in rows if row["arm"] == arm]
        x, y = [row["gap_of_encoder"] for row in own], [100 * row["recovered"] for row in own]
        axes.plot(x, y, color=colour, marker="o", linestyle="", label=arm)
    axes.axhline(80, color="#cccccc", linewidth=1, linestyle=":")
    axes.set(xlabel="gap over the encoder's time", ylabel="% of min(gap, encoder)\nrecovered")
    axes.set_title("gaps", fontsize=9, loc="left")
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
