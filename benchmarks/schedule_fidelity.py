"""Steps of the engine beside their simulation, with modules whose compute is a timed wait.

python -m benchmarks.schedule_fidelity
"""

import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.machine import write_results
from benchmarks.timed_plans import WORLD_SIZE, TimedPlan, fidelity_plans
from benchmarks.timed_run import Counts, run_on_rank
from megatron_mosaic.schedule.build import build_schedule
from megatron_mosaic.schedule.measured import read_trace
from megatron_mosaic.schedule.program import program_of
from megatron_mosaic.schedule.simulate import simulate
from tests.ranks import run_ranks

COUNTS = Counts(without_waits=12, with_waits=3)
"""Steps of each plan."""

TIMEOUT_S = 600.0


def predicted_s(timed: TimedPlan) -> float:
    """Makespan that the simulator predicts from the waits alone: transfers take no time."""
    schedule = build_schedule(timed.plan)
    return simulate(program_of(timed.plan, schedule), tasks_s=timed.tasks_s).makespan_s


def measure(plans: Sequence[TimedPlan], *, counts: Counts = COUNTS) -> list[dict[str, Any]]:
    """Runs plans of equally many ranks on real ones.

    Returns:
        For each plan the makespans of its steps, by the trace that the ranks wrote, and the
        processor time of a task.
    """
    with tempfile.TemporaryDirectory(prefix="trace-") as folder:
        arguments = (list(plans), folder, counts)
        world_size = plans[0].plan.world_size
        ranks = run_ranks(run_on_rank, world_size, *arguments, timeout_s=TIMEOUT_S)
        measured = []
        for n in range(len(plans)):
            steps_s = [step.makespan_s for step in read_trace(Path(folder) / str(n))]
            measured.append(
                {
                    # The first steps are slow: their memory was not touched yet.
                    "without_waits_s": steps_s[: counts.without_waits][counts.without_waits // 2 :],
                    "steps_s": steps_s[counts.without_waits :],
                    "processor_s": statistics.median(rank[n] for rank in ranks if rank[n]),
                }
            )
        return measured


def compare(plans: Sequence[TimedPlan]) -> list[dict[str, Any]]:
    """Measures plans, and puts them beside their simulation."""
    rows = []
    for timed, measured in zip(plans, measure(plans), strict=True):
        expected_s, seen_s = predicted_s(timed), statistics.median(measured["steps_s"])
        tasks = build_schedule(timed.plan).tasks
        rows.append(
            {
                "plan": timed.name,
                "schedule": timed.plan.schedule.kind,
                "tasks": sum(map(len, tasks)),
                "predicted_s": expected_s,
                "measured_s": seen_s,
                "steps_s": measured["steps_s"],
                "error": seen_s / expected_s - 1,
                "processor_s_per_task": measured["processor_s"],
                "without_waits_s_per_task": (
                    statistics.median(measured["without_waits_s"]) / max(map(len, tasks))
                ),
            }
        )
    return rows


def summarize(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Returns the numbers that a reader wants first."""
    errors = [abs(row["error"]) for row in rows]
    return {
        "plans": len(rows),
        "median_error": statistics.median(errors),
        "worst_error": max(errors),
        "processor_s_per_task": statistics.median(row["processor_s_per_task"] for row in rows),
        "without_waits_s_per_task": statistics.median(
            row["without_waits_s_per_task"] for row in rows
        ),
    }


def print_table(rows: Sequence[dict[str, Any]], summary: dict[str, Any]) -> None:
    """Prints a row for each plan."""
    table = Table(title=f"Steps of {WORLD_SIZE} ranks, simulated and measured")
    table.add_column("plan")
    for name in ("simulated s", "measured s", "error", "processor us/task", "no waits, us/task"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            row["plan"],
            f"{row['predicted_s']:.3f}",
            f"{row['measured_s']:.3f}",
            f"{row['error']:+.1%}",
            f"{1e6 * row['processor_s_per_task']:.0f}",
            f"{1e6 * row['without_waits_s_per_task']:.0f}",
        )
    console = Console(width=120)
    console.print(table)
    console.print(summary)


def main() -> None:
    """Measures, prints and writes."""
    rows = compare(fidelity_plans())
    summary = summarize(rows)
    print_table(rows, summary)
    print(write_results("schedule_fidelity", {"summary": summary, "plans": rows}))


if __name__ == "__main__":
    main()
