"""Compares what a plan predicts with what ran, task by task.

    torchrun ... --mosaic-plan plan.yaml --mosaic-trace DIR [--profile --use-pytorch-profiler]
    python -m tools.compare_trace plan.yaml DIR
    python -m tools.compare_trace plan.yaml DIR --profile rank-0.json.gz --rank 0

The trace says how long each task took on each rank. A profile of torch (Megatron's, or any other
that torch exports for Chrome) says of one rank which part of that its kernels communicated.
"""

import argparse
import gzip
import json
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np

from megatron_mosaic.errors import LayoutError, PlanError
from megatron_mosaic.layout.plan import Plan
from megatron_mosaic.report.prediction import read_prediction
from megatron_mosaic.report.step import read_step
from megatron_mosaic.report.units import seconds
from megatron_mosaic.schedule.graph import Stage
from megatron_mosaic.schedule.measured import MeasuredStep, measured_times, read_trace
from megatron_mosaic.schedule.simulate import PassTimes, covered_s

# Kernels of NCCL; on a CPU the work of gloo, as torch names both.
_COMMUNICATION = ("nccl", "gloo:")
# Where torch writes what a device did; on a CPU what gloo did is an annotation.
_CATEGORIES = ("kernel", "gpu_user_annotation", "user_annotation")


class Row(NamedTuple):
    """A pass of a stage; None where nothing is known.

    Args:
        name: Such as ``F vision.0``.
        predicted_s: Of its longest task.
        measured_s: The same, the median over steps and ranks.
        communication: Share of its tasks in which their rank communicates.
    """

    name: str
    predicted_s: float | None
    measured_s: float
    communication: float | None = None


class Events(NamedTuple):
    """Communication of one rank, in Unix time."""

    start_s: np.ndarray
    end_s: np.ndarray


def rows(
    predicted: Mapping[Stage, PassTimes],
    measured: Mapping[Stage, PassTimes],
    *,
    shares: Mapping[tuple[str, Stage], float],
) -> Iterator[Row]:
    """Yields every pass that took any time, stage by stage."""
    for stage in sorted(measured):
        for kind, position in (("F", 0), ("B", 1)):
            if measured[stage][position]:
                yield Row(
                    f"{kind} {stage.module}.{stage.stage}",
                    predicted[stage][position] if stage in predicted else None,
                    measured[stage][position],
                    shares.get((kind, stage)),
                )


def read_profile(path: Path) -> Events:
    """Reads when a rank communicated from a profile that torch exported for Chrome.

    Raises:
        PlanError: The file is none, or tells no time of day.
    """
    try:
        raw = path.read_bytes()
        raw = gzip.decompress(raw) if path.suffix == ".gz" else raw
        document = json.loads(raw)
        base_s = document["baseTimeNanoseconds"] / 1e9
        events = [event for event in document["traceEvents"] if _communicates(event)]
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise PlanError(
            f"{path}: file must be a profile as torch exports it ({type(error).__name__}: "
            f"{error}); profile again with torch >= 2.2"
        ) from None
    start_s = np.array([base_s + event["ts"] / 1e6 for event in events])
    return Events(start_s, start_s + np.array([event["dur"] / 1e6 for event in events]))


def communication_shares(trace: Path, rank: int, events: Events) -> dict[tuple[str, Stage], float]:
    """Median share of each pass of one rank in which it communicates.

    Tasks outside the profile, which is of a few steps, do not count.

    Raises:
        PlanError: The rank has no trace, or none of its tasks ran while it was profiled.
    """
    if not (path := trace / f"rank{rank}.jsonl").exists():
        raise PlanError(f"trace: rank={rank} must have {path}; give a rank of the traced run")
    first_s, last_s = min(events.start_s, default=0.0), max(events.end_s, default=0.0)
    found: dict[tuple[str, Stage], list[float]] = defaultdict(list)
    for line in path.read_text(encoding="utf-8").splitlines():
        task = json.loads(line)
        start_s, end_s = task["start_s"], task["end_s"]
        if first_s <= start_s and end_s <= last_s and end_s > start_s:
            key = task["kind"], Stage(task["module"], task["stage"])
            found[key].append(_covered(events, start_s, end_s) / (end_s - start_s))
    if not found:
        raise PlanError(
            f"profile: tasks of rank {rank}=0 must be > 0 while it communicated; trace and profile "
            f"the same steps of the same run"
        )
    return {key: median(shares) for key, shares in found.items()}


def _communicates(event: Mapping[str, Any]) -> bool:
    name = str(event.get("name", "")).lower()
    return (
        event.get("ph") == "X"
        and event.get("cat") in _CATEGORIES
        and name.startswith(_COMMUNICATION)
    )


def _covered(events: Events, start_s: float, end_s: float) -> float:
    """Time of a span in which any event lasts."""
    inside = (events.end_s > start_s) & (events.start_s < end_s)
    if not inside.any():
        return 0.0
    clipped = np.clip(np.stack(events), start_s, end_s)[:, inside]
    return covered_s(clipped[0], clipped[1])


def lines(
    plan: Plan, steps: Sequence[MeasuredStep], table: Sequence[Row], step: tuple[float, float]
) -> Iterator[str]:
    """Yields the lines of the comparison.

    Args:
        plan: The plan.
        steps: Those that were measured.
        table: Passes.
        step: Time of a step's tasks, simulated and measured.
    """
    yield f"{'':<22} {'predicted':>10} {'measured':>10} {'ratio':>7} {'communicates':>13}"
    for row in table:
        yield _line(row)
    yield _line(Row("tasks of a step", *step))
    busiest_s = max(steps[-1].busy_s(rank) for rank in steps[-1].spans)
    waits = 1 - busiest_s / steps[-1].makespan_s
    yield f"the busiest of {plan.world_size} ranks waits for {waits:.1%} of the last step's tasks"


def _line(row: Row) -> str:
    known = row.predicted_s is not None and row.predicted_s > 0
    cells = (
        seconds(row.predicted_s) if row.predicted_s is not None else "-",
        seconds(row.measured_s),
        f"{row.measured_s / row.predicted_s:.2f}" if known and row.predicted_s else "-",
        "-" if row.communication is None else f"{row.communication:.1%}",
    )
    return f"{row.name:<22} {cells[0]:>10} {cells[1]:>10} {cells[2]:>7} {cells[3]:>13}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the comparison. Returns 0, or 2 if the files do not belong together."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("plan", help="plan file of the run")
    parser.add_argument("trace", type=Path, help="folder of --mosaic-trace")
    parser.add_argument("--profile", type=Path, help="profile of one rank, JSON, .gz or not")
    parser.add_argument("--rank", type=int, default=0, help="the rank of the profile")
    args = parser.parse_args(arguments)
    try:
        plan = Plan.load(args.plan)
        prediction = read_prediction(plan)
        step = read_step(plan, prediction, trace=args.trace)
        steps = read_trace(args.trace)
        shares = {}
        if args.profile is not None:
            shares = communication_shares(args.trace, args.rank, read_profile(args.profile))
    except (PlanError, LayoutError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    table = list(rows(prediction.tasks_s, measured_times(steps[1:] or steps), shares=shares))
    assert step.measured is not None, "there is a trace"
    both_s = step.timeline.makespan_s, step.measured.makespan_s
    print("\n".join(lines(plan, steps, table, both_s)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
