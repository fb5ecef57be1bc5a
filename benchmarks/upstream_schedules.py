"""Steps of the engine beside those of upstream's schedules: same modules, layouts and waits.

python -m benchmarks.upstream_schedules
"""

import logging
import statistics
import time
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from benchmarks.machine import write_results
from benchmarks.schedule_fidelity import predicted_s
from benchmarks.timed_plans import WORLD_SIZE, TimedPlan, upstream_plans
from benchmarks.timed_run import TimedEngine, hurry
from tests.ranks import run_ranks

WARM_UPS = 6
REPEATS = 4
TIMEOUT_S = 300.0
ROUND = ("mosaic", "upstream", "again")
"""What runs in turn; the engine twice, so that its own spread is known."""

Moments = Mapping[str, Sequence[tuple[float, float]]]


class Contestant(Protocol):
    """Runs a step."""

    def step(self, *, waits: bool) -> None:
        """Runs a step, with waits or as fast as it can."""
        ...

    def destroy(self) -> None:
        """Destroys the groups that were made."""
        ...


def race_on_rank(rank: int, plans: Sequence[TimedPlan]) -> list[Moments]:
    """Runs every plan in both ways, in turn. Called on every rank.

    Returns:
        For every plan the beginning and end of each step on this rank.
    """
    hurry()
    logging.getLogger().setLevel(logging.WARNING)  # upstream tells of every construction
    warnings.simplefilter("ignore")  # and uses what torch warns of
    return [_race(rank, timed) for timed in plans]


def _race(rank: int, timed: TimedPlan) -> Moments:
    # Forked ranks are not to load it before they are made to run on CPU.
    from benchmarks.upstream_run import UpstreamDisjoint, UpstreamThreePhase

    disjoint = timed.plan.schedule.kind == "1f1b"
    upstream = UpstreamDisjoint if disjoint else UpstreamThreePhase
    contestants: dict[str, Contestant] = {
        "mosaic": TimedEngine(timed, rank=rank),
        "upstream": upstream(timed, rank=rank),
    }
    moments: dict[str, list[tuple[float, float]]] = {name: [] for name in ROUND}
    for repeat in range(WARM_UPS + REPEATS):
        for name in ROUND:
            contestant = contestants.get(name, contestants["mosaic"])
            dist.barrier()
            start_s = time.monotonic()
            contestant.step(waits=repeat >= WARM_UPS)
            if repeat >= WARM_UPS:
                moments[name].append((start_s, time.monotonic()))
    dist.barrier()
    for contestant in contestants.values():
        contestant.destroy()
    return moments


def steps_s(ranks: Sequence[Moments], name: str) -> list[float]:
    """Times from when the first rank begins until the last one ends."""
    rounds = zip(*(rank[name] for rank in ranks), strict=True)
    return [max(end for _, end in one) - min(start for start, _ in one) for one in rounds]


def compare(plans: Sequence[TimedPlan]) -> list[dict[str, Any]]:
    """Races every plan."""
    ranks = run_ranks(race_on_rank, WORLD_SIZE, list(plans), timeout_s=TIMEOUT_S)
    rows = []
    for n, timed in enumerate(plans):
        steps = {name: steps_s([rank[n] for rank in ranks], name) for name in ROUND}
        middle = {name: statistics.median(each) for name, each in steps.items()}
        rows.append(
            {
                "plan": timed.name,
                "predicted_s": predicted_s(timed),
                "steps_s": steps,
                "mosaic_s": middle["mosaic"],
                "upstream_s": middle["upstream"],
                "ratio": middle["mosaic"] / middle["upstream"],
                "noise": _spread([*steps["mosaic"], *steps["again"]]),
            }
        )
    return rows


def _spread(steps_s: Sequence[float]) -> float:
    """How far apart the steps of one contestant are, over their median."""
    return (max(steps_s) - min(steps_s)) / statistics.median(steps_s)


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    """Prints a row for each plan."""
    table = Table(title=f"Steps of {WORLD_SIZE} ranks: Mosaic's engine and upstream's schedules")
    table.add_column("plan")
    for name in ("simulated s", "Mosaic s", "upstream s", "Mosaic / upstream", "noise of Mosaic"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            row["plan"],
            *(f"{row[name]:.3f}" for name in ("predicted_s", "mosaic_s", "upstream_s", "ratio")),
            f"{row['noise']:.1%}",
        )
    Console(width=120).print(table)


def main() -> None:
    """Races, prints and writes."""
    rows = compare(upstream_plans())
    print_table(rows)
    print(write_results("upstream_schedules", {"plans": rows}))


if __name__ == "__main__":
    main()
