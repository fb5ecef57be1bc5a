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
    makers = {"p1": _curves, "p2": _pairs, "p3": _overheads, "p5": _gaps}
    found = [make(rows) for part, make in makers.items() if (rows := rows_of(results, part))]
    steps = [row for row in rows_of(results, "p4") if row.get("arms")]
    if steps:
        found += [*map(_steps, steps), _scans(steps)]
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
    table = _table("P3: what lanes cost", "what", "us")
    for row in rows:
        told = row.get("failed") or ("no GPU" if "needs" in row else f"{1e6 * row['s'][0]:.2f}")
        table.add_row(row["overhead"], told)
    return table


def _steps(row: Mapping[str, Any]) -> Table:
    """Every arm of a case: its step, its gain over the best serial arm, and what goes with it."""
    control = "" if row["noise"] is None else f", A/A ±{100 * row['noise']:.1f} %"
    table = _table(
        f"P4: {row['case']}; gain over {row['serial']}{control}; perfect overlap "
        f"{row['ideal_gain']:.2f}, roofline {row['roofline_gain']:.2f}",
        *("arm", "SMs", "ms", "gain", "interval", "gradients off", "GiB", "MHz", "W"),
    )
    for name, arm in row["arms"].items():
        table.add_row(name, _sms(arm["sms"]), *_arm_cells(arm))
    table.caption = "; ".join(_expected(name, own) for name, own in row["planned"].items())
    return table


def _expected(name: str, planned: Mapping[str, Any]) -> str:
    """What the planner expects of its choice, an optimizer's step included."""
    shared_s = planned["shared_s"]
    told = f"{name}: {planned['kind']}, gain {planned['serial_s'] / planned['step_s']:.3f} expected"
    if planned["kind"] == "concurrent" or shared_s is None:
        return told
    return f"{told}, {planned['serial_s'] / shared_s:.3f} of the best with lanes"


def _sms(sms: Mapping[str, int | None]) -> str:
    return "|".join("-" if own is None else str(own) for own in sms.values())


def _arm_cells(arm: Mapping[str, Any]) -> list[str]:
    if arm.get("failed"):
        return ["failed", arm["failed"][:60]]
    gain, sensors, peak = arm["gain"], arm["sensors"] or {}, arm["peak_bytes"]
    return [
        f"{1e3 * arm['median_s']:.2f}",
        f"{gain['estimate']:.3f}",
        f"{gain['low']:.3f} to {gain['high']:.3f}",
        f"{max(arm['gradient_errors'].values()):.1e}",
        "" if peak is None else f"{peak / 2**30:.1f}",
        *(f"{sensors[key]:.0f}" if sensors else "" for key in ("sm_clock_mhz", "power_w")),
    ]


def _scans(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Steps of all quotas that were tried, over the fastest of them: losses stand here, too."""
    table = _table("P4: quotas that were tried, slower than the best of them", "case", "kind", "%")
    for row in rows:
        for kind in ("split", "cap"):
            tried = [each for each in row["scan"] if each["kind"] == kind and each["median_s"]]
            least_s = min((each["median_s"] for each in tried), default=0.0)
            cells = (
                f"{_sms(each['sms'])} {100 * (each['median_s'] / least_s - 1):.0f}"
                for each in tried
            )
            table.add_row(row["case"], kind, "  ".join(cells))
    return table


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
