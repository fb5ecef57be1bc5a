"""Results as tables and a picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.sharing.chart import draw
from benchmarks.sharing.results import Results, read, rows_of
from benchmarks.sharing.verdicts import Verdict, verdicts

WORDS = {True: "yes", False: "NO", None: "not measured"}


def print_summary(path: Path) -> None:
    """Prints all tables of a file and draws its picture beside it."""
    results, console = read(path), Console(width=160)
    for table in tables(results):
        console.print(table)
    console.print(draw(results, path.with_suffix(".png")))


def tables(results: Results) -> list[Table]:
    """One table for every part that has run, and what was to be shown."""
    makers = {
        "p1": _curves,
        "p2": _pairs,
        "p3": _overheads,
        "p4": _steps,
        "p5": _gaps,
    }
    found = [make(rows) for part, make in makers.items() if (rows := rows_of(results, part))]
    return [*found, _lines(verdicts(results))]


def _curves(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Times of operations over that on the whole GPU, by SM count."""
    ran = [row for row in rows if row.get("median_s")]
    counts = sorted({row["sms"] for row in ran})
    table = _table("P1: rate on some SMs over that on all", "operation", *map(str, counts))
    for name in dict.fromkeys(row["operation"] for row in ran):
        times_s = {row["sms"]: row["median_s"] for row in ran if row["operation"] == name}
        whole_s = times_s.get(counts[-1])
        table.add_row(
            name,
            *(
                f"{whole_s / times_s[count]:.2f}" if whole_s and count in times_s else ""
                for count in counts
            ),
        )
    return table


def _pairs(rows: Sequence[Mapping[str, Any]]) -> Table:
    table = _table("P2: slower beside another", "first", "second", "SMs", "first", "second")
    for row in rows:
        told = [row.get("failed") or row.get("skipped") or "no GPU", ""]
        if row.get("co_run_s"):
            told = [f"{a / b:.3f}" for a, b in zip(row["co_run_s"], row["solo_s"], strict=True)]
        table.add_row(*row["operations"], "|".join(map(str, row["sms"])), *told)
    return table


def _overheads(rows: Sequence[Mapping[str, Any]]) -> Table:
    table = _table("P3: what lanes cost", "what", "clock", "us")
    for row in rows:
        told = row.get("failed") or ("no GPU" if "needs" in row else f"{1e6 * row['s'][0]:.2f}")
        table.add_row(row["overhead"], row.get("clock", "host"), told)
    return table


def _steps(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Gains of every arm over the best serial one; its own step in milliseconds."""
    ran = [row for row in rows if row.get("arms")]
    names = list(dict.fromkeys(name for row in ran for name in row["arms"]))
    table = _table("P4: steps of the best serial arm over those of each arm", "case", "serial",
                   "ms", *names, "A/A", "ideal", "roofline")  # fmt: skip
    for row in ran:
        serial = row["serial"]
        table.add_row(
            row["case"],
            serial,
            f"{1e3 * row['arms'][serial]['median_s']:.1f}" if serial else "",
            *(_gain(row["arms"].get(name)) for name in names),
            f"±{100 * row['noise']:.1f} %" if row["noise"] is not None else "",
            f"{row['ideal_gain']:.2f}",
            f"{row['roofline_gain']:.2f}",
        )
    return table


def _gain(arm: Mapping[str, Any] | None) -> str:
    if arm is None:
        return ""
    if not arm.get("gain"):
        return "-"
    gain = arm["gain"]
    return f"{gain['estimate']:.2f} [{gain['low']:.2f}, {gain['high']:.2f}]"


def _gaps(rows: Sequence[Mapping[str, Any]]) -> Table:
    table = _table("P5: recovered of min(gap, encoder)", "case", "gap / encoder", "arm", "share")
    for row in rows:
        recovered = row.get("recovered")
        told = row.get("failed") or row.get("skipped") or "no GPU"
        table.add_row(
            row["case"],
            f"{row['gap_of_encoder']:.2f}",
            row["arm"] or "",
            told if recovered is None else f"{100 * recovered:.0f} %",
        )
    return table


def _lines(found: Sequence[Verdict]) -> Table:
    table = _table("What was to be shown", "line", "holds", "numbers")
    for verdict in found:
        table.add_row(verdict.line, WORDS[verdict.holds], verdict.why)
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right")
    return table
