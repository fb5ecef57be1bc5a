"""Frozen-aware against unaware splits on Cornstarch's published stage times, executed.

python -m benchmarks.frozen_execution

The splits, and the stage counts that they assume, are those of ``frozen_partition.py``. Stages run
in the engine with waits instead of compute; the times of a case are scaled down alike in both of
its splits, so their ratio stays.
"""

import statistics
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.frozen_partition import (
    CASES,
    MOST_STAGES,
    NUM_MICROBATCHES,
    SOURCE,
    Case,
    assumed_counts,
    own_stages,
    published_stages,
    step_s,
)
from benchmarks.machine import write_results
from benchmarks.schedule_fidelity import measure, predicted_s
from benchmarks.timed_plans import TimedPlan, place, timed
from benchmarks.timed_run import Counts
from megatron_mosaic.schedule.simulate import PassTimes

STEP_S = 1.5
"""Time of the aware split's step, after scaling."""

COUNTS = Counts(without_waits=4, with_waits=2)
SPLITS = ("published stages", "own split")

Stages = tuple[list[PassTimes], list[PassTimes]]


def stages_of(case: Case, split: str) -> tuple[Stages, Stages]:
    """Stages of encoder and LLM, aware and unaware of what is frozen."""
    aware, unaware, _ = assumed_counts(case)
    if split == "published stages":
        return published_stages(case.aware, aware), published_stages(case.unaware, unaware)
    return own_stages(case, aware, aware=True), own_stages(case, aware, aware=False)


def plans_of(case: Case, split: str) -> tuple[TimedPlan, TimedPlan]:
    """The two plans, in equally scaled times."""
    aware, unaware = stages_of(case, split)
    scale = STEP_S / step_s([*aware[0], *aware[1]])
    return (
        _plan(f"{case.name}, {split}, aware", aware, scale),
        _plan(f"{case.name}, {split}, unaware", unaware, scale),
    )


def _plan(name: str, stages: Stages, scale: float) -> TimedPlan:
    encoder, language = (
        [PassTimes(forward_s * scale, backward_s * scale) for forward_s, backward_s in module]
        for module in stages
    )
    first, last = len(encoder), len(encoder) + len(language)
    return timed(
        name,
        "1f1b",
        [
            # Encoder and LLM are frozen; the gradient goes back to the projector.
            place("vision", range(first), pp=len(encoder), trainable=("projector",)),
            place("language", range(first, last), pp=len(language), trainable=()),
        ],
        num_microbatches=NUM_MICROBATCHES,
        waits_s={"vision": encoder, "language": language},
        world_size=MOST_STAGES,
    )


def compare() -> list[dict[str, Any]]:
    """Runs all splits, and puts their ratios beside the simulated and the published ones."""
    pairs = [(case, split, *plans_of(case, split)) for case in CASES for split in SPLITS]
    measured = iter(
        measure([plan for *_, aware, unaware in pairs for plan in (aware, unaware)], counts=COUNTS)
    )
    rows = []
    for case, split, aware, unaware in pairs:
        steps_s = [statistics.median(next(measured)["steps_s"]) for _ in range(2)]
        simulated_s = [predicted_s(aware), predicted_s(unaware)]
        simulated, executed = simulated_s[1] / simulated_s[0], steps_s[1] / steps_s[0]
        rows.append(
            {
                "case": case.name,
                "split": split,
                "stages": {"aware": _counts(aware), "unaware": _counts(unaware)},
                "simulated_s": simulated_s,
                "executed_s": steps_s,
                "simulated_gain": simulated,
                "executed_gain": executed,
                "difference": executed / simulated - 1,
                "published_gain": case.unaware.iteration_s / case.aware.iteration_s,
            }
        )
    return rows


def _counts(timed: TimedPlan) -> list[int]:
    return [timed.plan.modules[name].num_stages for name in ("vision", "language")]


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    """Prints a row for each case and split."""
    table = Table(title=f"Unaware / aware step; {SOURCE}; stages (encoder, LLM) are assumed")
    for name in ("case", "split", "aware", "unaware"):
        table.add_column(name)
    for name in ("simulated", "executed", "apart", "published"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            row["case"],
            row["split"],
            *(str(tuple(row["stages"][name])) for name in ("aware", "unaware")),
            *(f"{row[name]:.2f}x" for name in ("simulated_gain", "executed_gain")),
            f"{row['difference']:+.1%}",
            f"{row['published_gain']:.2f}x",
        )
    Console(width=120).print(table)


def main() -> None:
    """Runs, prints and writes."""
    rows = compare()
    print_table(rows)
    results = {"source": SOURCE, "num_microbatches": NUM_MICROBATCHES, "cases": rows}
    print(write_results("frozen_execution", results))


if __name__ == "__main__":
    main()
