"""Writes the numbers of the schedules' benchmarks into ``README.md``, where a test looks for them.

python -m benchmarks.schedule_summary
"""

from collections.abc import Sequence
from typing import Any

from benchmarks.fidelity_chart import draw
from benchmarks.machine import RESULTS, read_results
from benchmarks.summary import README, describe

FIRST, LAST = "<!-- schedules -->\n", "<!-- end of schedules -->\n"


def numbers() -> str:
    """Returns the results in Markdown."""
    parts = [
        _fidelity(read_results("schedule_fidelity")),
        _races(read_results("upstream_schedules")),
        _frozen(read_results("frozen_execution")),
    ]
    return "\n" + "\n".join(parts) + "\n"


def main() -> None:
    """Rewrites what stands between the two marks, and the picture."""
    before, _, rest = README.read_text().partition(FIRST)
    _, _, after = rest.partition(LAST)
    README.write_text(f"{before}{FIRST}{numbers()}{LAST}{after}")
    print(draw(RESULTS / "schedule_fidelity.png"))


def _fidelity(results: dict[str, Any]) -> str:
    summary = results["summary"]
    text = (
        f"{describe(results['machine'])}; eight ranks over gloo. Of {summary['plans']} plans the "
        f"measured step is apart from the simulated one by {summary['median_error']:.1%} in the "
        f"median and {summary['worst_error']:.1%} at worst. The engine takes "
        f"{1e6 * summary['processor_s_per_task']:.0f} us of a processor for a task, transfers "
        f"included; eight ranks that compute nothing share two cores and need "
        f"{1e6 * summary['without_waits_s_per_task']:.0f} us a task.\n"
    )
    rows = [
        [
            row["plan"],
            row["schedule"],
            f"{row['predicted_s']:.3f}",
            f"{row['measured_s']:.3f}",
            f"{row['error']:+.1%}",
            f"{1e6 * row['processor_s_per_task']:.0f}",
        ]
        for row in results["plans"]
    ]
    head = ["plan", "schedule", "simulated s", "measured s", "apart", "us of a processor a task"]
    return f"{text}\n{_table(head, rows)}"


def _races(results: dict[str, Any]) -> str:
    rows = [
        [
            row["plan"],
            *(f"{row[key]:.3f}" for key in ("mosaic_s", "upstream_s", "ratio")),
            f"{row['noise']:.1%}",
        ]
        for row in results["plans"]
    ]
    head = ["plan", "Mosaic s", "upstream s", "Mosaic / upstream", "spread of Mosaic's own steps"]
    return _table(head, rows)


def _frozen(results: dict[str, Any]) -> str:
    rows = [
        [
            row["case"],
            row["split"],
            *("{} + {}".format(*row["stages"][name]) for name in ("aware", "unaware")),
            *(f"{row[key]:.2f}x" for key in ("simulated_gain", "executed_gain")),
            f"{row['difference']:+.1%}",
            f"{row['published_gain']:.2f}x",
        ]
        for row in results["cases"]
    ]
    head = ["model", "stage times of", "aware", "unaware", "simulated", "executed", "apart"]
    return f"{results['source']}.\n\n{_table([*head, 'published'], rows)}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


if __name__ == "__main__":
    main()
