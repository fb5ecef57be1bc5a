"""Copies the numbers of ``results/cp_balance.json`` into ``README.md``; a test compares them.

python -m benchmarks.balance_summary
"""

from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.balance_chart import draw_balance
from benchmarks.machine import RESULTS, read_results
from benchmarks.summary import README, describe

FIRST, LAST = "<!-- cp balance -->\n", "<!-- end of cp balance -->\n"
_PUBLISHED_FAMILIES = ("EP", "EE", "MP")
_METHODS = ("contiguous", "zigzag", "lpt", "balanced")

Row = dict[str, Any]


def numbers() -> str:
    """Returns the results in Markdown."""
    results = read_results("cp_balance")
    rows = results["rows"]
    parts = [f"{describe(results['machine'])}, one thread.", _ratios(rows), _local(rows)]
    return "\n" + "\n\n".join([*parts, _times(rows), _above(rows)]) + "\n"


def main() -> None:
    """Rewrites what stands between the two marks, and the picture."""
    before, _, rest = README.read_text().partition(FIRST)
    _, _, after = rest.partition(LAST)
    README.write_text(f"{before}{FIRST}{numbers()}{LAST}{after}")
    draw_balance(read_results("cp_balance")["rows"], RESULTS / "cp_balance.png")


def _ratios(rows: Sequence[Row]) -> str:
    ranks = sorted({row["cp"] for row in rows})
    lines = [
        f"| generator | tiles | tokens | method | {' | '.join(f'CP {cp}' for cp in ranks)} |",
        f"| --- | --- | --- | --- |{' --- |' * len(ranks)}",
    ]
    rows = [row for row in rows if row["family"] in _PUBLISHED_FAMILIES]
    settings = dict.fromkeys((row["generator"], row["tile"], row["length"]) for row in rows)
    for generator, tile, length in settings:
        for method in _METHODS:
            cells = []
            for cp in ranks:
                key = (generator, tile, length, method, cp)
                chosen = [row for row in rows if _key(row) == key]
                if chosen:
                    worst = max(row["tiles_worst"] for row in chosen)
                    mean = sum(row["tiles_mean"] for row in chosen) / len(chosen)
                    cells.append(f"{worst:.3f} ({mean:.3f})")
            if cells:
                start = f"{generator} | {tile} | {length >> 10}k | {method}"
                lines.append(f"| {start} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _key(row: Row) -> tuple[str, str, int, str, int]:
    return row["generator"], row["tile"], row["length"], row["method"], row["cp"]


def _local(rows: Sequence[Row]) -> str:
    lines = [
        "`local`, packed documents, tiles 128x32; keys received are over those of `contiguous`:\n",
        "| generator | tokens | ranks | tiles, worst | tokens, worst | keys received, mean | worst "
        "| `balanced` receives | ms |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        if row["method"] == "local" and row["cp"] in (8, 32):
            beside = next(
                each
                for each in rows
                if _key(each) == (*_key(row)[:3], "balanced", row["cp"]) and each["family"] == "MP"
            )
            lines.append(
                f"| {row['generator']} | {row['length'] >> 10}k | {row['cp']} "
                f"| {row['tiles_worst']:.3f} | {row['tokens_worst']:.3f} "
                f"| {row['of_contiguous_mean']:.2f} | {row['of_contiguous_worst']:.2f} "
                f"| {beside['of_contiguous_mean']:.1f} | {row['time_s_mean'] * 1e3:.0f} |"
            )
    return "\n".join(lines)


def _times(rows: Sequence[Row]) -> str:
    def of(length: int, reduce: Callable[[list[float]], float], key: str) -> float:
        found = [row for row in rows if (row["length"], row["method"]) == (length, "balanced")]
        return reduce([row[key] for row in found if row["tile"] == "128x32"]) * 1e3

    told = [
        f"{of(length, lambda each: sum(each) / len(each), 'time_s_mean'):.1f} ms "
        f"({of(length, max, 'time_s_worst'):.1f} at worst) at {length >> 10}k"
        for length in sorted({row["length"] for row in rows})
    ]
    return f"From mask to `balanced` assignment, all families and ranks: {', '.join(told)}."


def _above(rows: Sequence[Row]) -> str:
    cases = [(row, each) for row in rows for each in row["above_goal"]]
    lines = [
        "Sequences whose ratio is above 1.005 (1.015 with 32 ranks), and what CP-SAT finds and "
        "proves of them within 10 s:\n",
        "| generator | tiles | tokens | family | ranks | seed | `balanced` | CP-SAT | at least |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row, each in cases:
        start = f"{row['generator']} | {row['tile']} | {row['length'] >> 10}k | {row['family']}"
        lines.append(
            f"| {start} | {row['cp']} | {each['seed']} | {each['tiles']:.4f} "
            f"| {each['least_found']:.4f} | {each['bound']:.4f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
