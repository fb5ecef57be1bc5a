"""Copies the numbers of ``results/sharing_planner.json`` into ``README.md``; a test compares them.

python -m benchmarks.sharing_planner_summary
"""

from collections.abc import Sequence
from typing import Any

from benchmarks.machine import RESULTS, read_results
from benchmarks.sharing_planner_chart import draw_sharing
from benchmarks.summary import README, describe

FIRST, LAST = "<!-- sharing planner -->\n", "<!-- end of sharing planner -->\n"

Row = dict[str, Any]


def numbers() -> str:
    """Returns the results in Markdown."""
    results = read_results("sharing_planner")
    rows = results["rows"]
    parts = [f"Planned on {describe(results['machine'])}, seconds of one core.", _steps(rows)]
    return "\n" + "\n\n".join([*parts, _wrong(rows), _optimum(rows)]) + "\n"


def main() -> None:
    """Rewrites what stands between the two marks, and the picture."""
    before, _, rest = README.read_text().partition(FIRST)
    _, _, after = rest.partition(LAST)
    README.write_text(f"{before}{FIRST}{numbers()}{LAST}{after}")
    draw_sharing(read_results("sharing_planner")["rows"], RESULTS / "sharing_planner.png")


def _steps(rows: Sequence[Row]) -> str:
    lines = [
        "| model, samples | GPUs | homogeneous | one at a time | at the same time | gain | plan "
        "| samples/s | search s (without) |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        homogeneous = row["homogeneous_s"]
        cells = (
            f"{row['model']}, {row['global_batch_size']}",
            f"{row['num_gpus']} {row['cluster'].upper()}",
            "none fits" if homogeneous is None else f"{homogeneous:.4g} s",
            f"{row['temporal_s']:.4g} s",
            "none" if row["gain"] is None else f"{row['temporal_s'] / (1 + row['gain']):.4g} s",
            "" if row["gain"] is None else f"{row['gain']:+.1%}",
            _choice(row),
            f"{row['global_batch_size'] / row['step_s']:.0f}",
            f"{row['search_s']:.1f} ({row['temporal_search_s']:.1f})",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _choice(row: Row) -> str:
    if not row["pays"]:
        return "one at a time"
    quotas = ", ".join(f"{name} {sms}" for name, sms in row["quotas"].items())
    return f"{quotas or 'no quotas'}; group {row['encoder_group']}"


def _wrong(rows: Sequence[Row]) -> str:
    judged = [row for row in rows if "predictors" in row]
    names = list(judged[0]["predictors"])
    lines = [
        "Plans that wrong curves have chosen, judged with the right ones: how much longer their "
        "step is than that of the plan that these choose.\n",
        f"| model | GPUs | {' | '.join(names)} |",
        f"| --- | --- |{' --- |' * len(names)}",
    ]
    for row in judged:
        cells = " | ".join(f"{row['predictors'][name]:.2%}" for name in names)
        lines.append(f"| {row['model']} | {row['num_gpus']} {row['cluster'].upper()} | {cells} |")
    return "\n".join(lines)


def _optimum(rows: Sequence[Row]) -> str:
    lines = [
        "The planner's best plan with lanes beside the best of all layouts, groups and quotas, "
        "with the largest microbatch:\n",
        "| model | GPUs | planner | optimum | plans simulated | seconds for the optimum |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        if "optimum" in row:
            best = row["optimum"]
            lines.append(
                f"| {row['model']} | {row['num_gpus']} | {best['planner_s']:.5g} s "
                f"| {best['step_s']:.5g} s | {best['examined']} of {best['plans']} "
                f"| {best['search_s']:.0f} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
