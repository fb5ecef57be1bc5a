"""Time that a rank takes to derive its routes, for 64 ranks a side and a step of 4,096 samples.

    python -m benchmarks.boundary_time [--repeats 5]

A step of 4,096 samples is not one boundary tensor but many microbatches, and a rank derives two
routes for each (activations and gradients) when their row counts are new; counts that repeat, in
this step or a later one, find their routes in a cache. Measured are, on the worst of some ranks:

- *first*: one route of one microbatch with new counts (median over microbatches and directions);
- *cached*: the same with known counts;
- *step*: all routes of a rank in a step, all counts new, and what is done once for the step;
- *at once*: one route of a microbatch that holds all 4,096 samples, the largest there can be.

Every sample has none to two images of 576 rows somewhere in a sequence of 2,048 tokens. Times
are processor time of the deriving thread, and of the repeats the fastest counts: others use the
machine, too. Writes ``results/boundary_time.json``.
"""

import argparse
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.machine import write_results
from megatron_mosaic.comm.boundary import BoundaryRoutes, BoundaryShape, ItemShape
from megatron_mosaic.comm.rank_route import Direction, Samples
from megatron_mosaic.layout.placement import ModulePlacement
from megatron_mosaic.layout.rows import Interval
from megatron_mosaic.layout.sharding import SequenceSharding

NUM_SAMPLES = 4096
NUM_RANKS = 64  # of each module
SEQUENCE_LENGTH = 2048
IMAGE_ROWS = 576
MICRO_BATCH_SIZES = (1, 4)
DIRECTIONS: tuple[Direction, ...] = ("activation", "gradient")
TARGET_S = 1e-3


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """Two layouts of 64 ranks each."""

    name: str
    source: ModulePlacement
    destination: ModulePlacement

    def routes(self, samples: Samples, *, micro_batch_size: int) -> BoundaryRoutes:
        """Routes of a step; the source runs 64 samples at a time, or one microbatch."""
        num_samples = micro_batch_size * self.destination.data_parallel_size
        num_microbatches = len(samples) // num_samples
        group = max(1, NUM_RANKS // num_samples)
        routes = BoundaryRoutes(
            self.source,
            self.destination,
            shape=BoundaryShape(
                samples_per_replica=micro_batch_size,
                sharding=SequenceSharding.of(self.destination, sequence_length=SEQUENCE_LENGTH),
                item=ItemShape(rows=IMAGE_ROWS),
            ),
        )
        routes.begin(
            samples,
            groups=[
                tuple(range(first, min(first + group, num_microbatches)))
                for first in range(0, num_microbatches, group)
            ],
        )
        return routes

    def some_ranks(self) -> list[int]:
        """Ranks of either module: at the ends of its list, and within."""
        places = (0, 9, 37, NUM_RANKS - 1)
        return sorted(
            {side.ranks[place] for side in (self.source, self.destination) for place in places}
        )


def cases() -> list[Case]:
    """All pairs of layouts: of the destination the tensor, context and sequence parallelism."""
    found = []
    for where, first in (("equal", 0), ("disjoint", NUM_RANKS)):
        for source_name, source_tp in (("DP64", 1), ("TP2 DP32", 2)):
            for name, tp, cp, sp in (
                ("TP8 DP8", 8, 1, False),
                ("TP8 DP8 SP", 8, 1, True),
                ("TP4 CP2 DP8", 4, 2, False),
                ("TP4 CP2 DP8 SP", 4, 2, True),
            ):
                source = _placement("vision", 0, tp=source_tp, dp=NUM_RANKS // source_tp)
                destination = _placement("language", first, tp=tp, cp=cp, dp=8, sp=sp)
                found.append(
                    Case(
                        name=f"{source_name} -> {name}, {where}",
                        source=source,
                        destination=destination,
                    )
                )
    return found


def _placement(
    name: str, first: int, *, tp: int = 1, cp: int = 1, dp: int = 1, sp: bool = False
) -> ModulePlacement:
    return ModulePlacement(
        name=name,
        ranks=tuple(range(first, first + tp * cp * dp)),
        tensor_model_parallel_size=tp,
        context_parallel_size=cp,
        data_parallel_size=dp,
        sequence_parallel=sp,
    )


def draw_samples() -> Samples:
    """Draws where the images of 4,096 samples belong, the same in every run."""
    chance = random.Random(1)
    samples = []
    for _ in range(NUM_SAMPLES):
        runs, position = [], chance.randrange(256)
        for _ in range(chance.choice((0, 1, 1, 2))):
            runs.append(Interval(position, position + IMAGE_ROWS))
            position += IMAGE_ROWS + chance.randrange(512)
        samples.append(tuple(runs))
    return tuple(samples)


def measure(case: Case, samples: Samples, repeats: int) -> dict[str, Any]:
    """Measures a case; seconds are those of the slowest of some ranks."""
    result: dict[str, Any] = {"case": case.name}
    for size in MICRO_BATCH_SIZES:
        ranks = [_best(case, samples, size, rank, repeats) for rank in case.some_ranks()]
        result[f"micro_batch_size_{size}"] = {
            "microbatches": NUM_SAMPLES // (size * case.destination.data_parallel_size),
            **{f"{key}_s": max(rank[key] for rank in ranks) for key in ranks[0]},
        }
    whole = NUM_SAMPLES // case.destination.data_parallel_size
    ranks = [_best(case, samples, whole, rank, repeats) for rank in case.some_ranks()]
    result["at_once"] = {f"{key}_s": max(rank[key] for rank in ranks) for key in ranks[0]}
    return result


def _best(case: Case, samples: Samples, size: int, rank: int, repeats: int) -> dict[str, float]:
    measured = [_derive_step(case, samples, size, rank) for _ in range(repeats)]
    return {key: min(each[key] for each in measured) for key in measured[0]}


def _derive_step(case: Case, samples: Samples, size: int, rank: int) -> dict[str, float]:
    """Derives all routes of a rank for one step twice: with new counts, then with known ones."""
    start_s = time.thread_time()
    routes = case.routes(samples, micro_batch_size=size)
    begin_s = time.thread_time() - start_s
    num_microbatches = NUM_SAMPLES // (size * case.destination.data_parallel_size)
    first, cached = (
        [
            _time_route(routes, direction, microbatch, rank)
            for microbatch in range(num_microbatches)
            for direction in DIRECTIONS
        ]
        for _ in range(2)
    )
    return {
        "first": statistics.median(first),
        "slowest": max(first),
        "cached": statistics.median(cached),
        "begin": begin_s,
        "step": begin_s + sum(first),
    }


def _time_route(routes: BoundaryRoutes, direction: Direction, microbatch: int, rank: int) -> float:
    start_s = time.thread_time()
    routes.route(direction, microbatch, rank=rank)
    return time.thread_time() - start_s


def summarize(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Returns the numbers that a reader wants first."""
    keys = [f"micro_batch_size_{size}" for size in MICRO_BATCH_SIZES]
    return {
        "target_s": TARGET_S,
        "worst_first_s": max(result[key]["first_s"] for result in results for key in keys),
        "worst_cached_s": max(result[key]["cached_s"] for result in results for key in keys),
        "worst_step_s": max(result[key]["step_s"] for result in results for key in keys),
        "at_once_within_target": [
            result["case"] for result in results if result["at_once"]["first_s"] < TARGET_S
        ],
    }


def print_table(results: Sequence[dict[str, Any]]) -> None:
    """Prints a row for each case."""
    table = Table(title="Milliseconds of one rank, the worst of some")
    table.add_column("layouts")
    for size in MICRO_BATCH_SIZES:
        for name in ("first", "cached", "step"):
            table.add_column(f"{name}, mbs {size}", justify="right")
    table.add_column("at once", justify="right")
    table.add_column("cached", justify="right")
    for result in results:
        cells = [
            result[f"micro_batch_size_{size}"][f"{name}_s"]
            for size in MICRO_BATCH_SIZES
            for name in ("first", "cached", "step")
        ]
        cells += [result["at_once"]["first_s"], result["at_once"]["cached_s"]]
        table.add_row(result["case"], *(f"{seconds * 1e3:.3f}" for seconds in cells))
    Console(width=140).print(table)


def main(argv: Sequence[str] | None = None) -> None:
    """Measures all cases, prints and writes the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=5, help="steps of which the fastest counts")
    repeats = parser.parse_args(argv).repeats
    samples = draw_samples()
    results = [measure(case, samples, repeats) for case in cases()]
    print_table(results)
    path = write_results(
        "boundary_time",
        {
            "ranks_per_module": NUM_RANKS,
            "samples": NUM_SAMPLES,
            "repeats": repeats,
            "summary": summarize(results),
            "cases": results,
        },
    )
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
