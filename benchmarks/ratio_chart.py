"""Bar chart of bytes received over the least possible."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

_MOSAIC, _UPSTREAM, _LEAST = "#1f7a8c", "#e39a45", "#555555"
_THICKNESS = 0.38


def draw_ratios(pairs: Sequence[dict[str, Any]], path: Path) -> None:
    """Draws a bar for Mosaic at each pair of layouts, and one for upstream where it has any."""
    figure = Figure(figsize=(9.5, 0.36 * len(pairs) + 1.6), layout="constrained")
    axes = figure.add_subplot()
    places = range(len(pairs))
    mosaic = [_total_ratio(pair) for pair in pairs]
    axes.barh(
        [y - _THICKNESS / 2 for y in places], mosaic, _THICKNESS, color=_MOSAIC, label="Mosaic"
    )
    taken = [(y, pair["upstream"]["ratio"]) for y, pair in enumerate(pairs) if pair["upstream"]]
    axes.barh(
        [y + _THICKNESS / 2 for y, _ in taken],
        [ratio for _, ratio in taken],
        _THICKNESS,
        color=_UPSTREAM,
        label="upstream's communicators",
    )
    for y, ratio in taken:
        axes.text(ratio + 0.02, y + _THICKNESS / 2, f"{ratio:.2f}", va="center", fontsize=7)
    for y, pair in enumerate(pairs):
        if not pair["upstream"]:
            axes.text(0.02, y + _THICKNESS / 2, "not taken", va="center", fontsize=7, color=_LEAST)
    axes.axvline(1.0, color=_LEAST, linewidth=0.8, linestyle="--")
    labels = [_label(pair) for pair in pairs]
    axes.set_yticks(list(places), labels, fontsize=8)
    axes.set_ylim(len(pairs) - 0.4, -0.6)
    axes.set_xlabel("bytes received / least possible, forward and gradient")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper right", ncols=2, frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)


def _label(pair: dict[str, Any]) -> str:
    unlike = ", unlike counts" if len(set(pair["items"])) > 1 else ""
    return f"{pair['source']} → {pair['destination']}  ({pair['ranks']}{unlike})"


def _total_ratio(pair: dict[str, Any]) -> float:
    least = sum(pair["least_bytes"])
    return sum(pair["mosaic"]["bytes"]) / least if least else 1.0
