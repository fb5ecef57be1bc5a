"""Bytes that cross a boundary, against the least possible and against upstream's communicators.

    python -m benchmarks.boundary_bytes [--repeats 15] [--add]

Eight ranks on this machine talk through gloo. For every pair of ``layout_pairs`` the bytes that
each rank receives are counted at the calls of torch.distributed, forward and gradient apart for
Mosaic, both together for upstream, and divided by the least of ``oracle``. The ratio must be 1.00
where the destination keeps parts of sequences. A tensor-parallel destination (and, for the
gradient, a tensor-parallel source) may receive what ``oracle`` states beyond it: less than ``tp``
rows of padding. What is delivered is compared with the rows themselves: a carrier with wrong ones
has no result.

Times are of a whole carry, there and back, the slowest rank's, on the same tensors, in turn; a
ratio below 1 means that Mosaic took less than upstream. Mosaic is timed twice: with its routes kept
from a microbatch with the same rows, and with both routes derived anew each time.

Writes ``results/boundary_bytes.json`` and ``results/boundary_bytes.png``. With ``--add`` results
that are there stay, and each new one says on what it ran.
"""

import argparse
import logging
import statistics
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from benchmarks.carriers import (
    Carrier,
    Mosaic,
    UnsupportedError,
    all_rows,
    own_rows,
    upstream,
)
from benchmarks.layout_pairs import HIDDEN_SIZE, PAIRS, Pair
from benchmarks.machine import RESULTS, describe_machine, read_results, write_results
from benchmarks.oracle import least_rows, rows_kept, rows_of
from benchmarks.ratio_chart import draw_ratios
from megatron_mosaic.comm.record import record
from megatron_mosaic.comm.replay import Entry
from megatron_mosaic.comm.traffic import total_received_bytes
from tests.ranks import RanksError, run_ranks

WORLD_SIZE = 8
ROW_BYTES = HIDDEN_SIZE * 4  # fp32
WARM_UPS = 3
TIMEOUT_S = 120.0


def main(argv: Sequence[str] | None = None) -> None:
    """Measures all pairs; prints, writes and draws the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=15, help="carries that are timed")
    parser.add_argument("--add", action="store_true", help="measure new pairs only")
    arguments = parser.parse_args(argv)
    before = read_results("boundary_bytes") if arguments.add else {"pairs": []}
    known = {_key(pair): pair for pair in before["pairs"]}
    pairs = [
        known.get((str(pair.source), str(pair.destination), pair.items))
        or measure(pair, arguments.repeats)
        for pair in PAIRS
    ]
    if arguments.add:
        for pair in pairs:
            if _key(pair) not in known:
                pair["machine"] = describe_machine()
    results = {
        "world_size": WORLD_SIZE,
        "row_bytes": ROW_BYTES,
        "repeats": arguments.repeats,
        "summary": summarize(pairs),
        "pairs": pairs,
    }
    results |= {"machine": before["machine"]} if arguments.add else {}
    print_table(pairs, results["summary"])
    print(f"wrote {write_results('boundary_bytes', results)}")
    draw_ratios(pairs, RESULTS / "boundary_bytes.png")


def _key(result: dict[str, Any]) -> tuple[str, str, tuple[int, ...]]:
    return result["source"], result["destination"], tuple(result["items"])


def measure(pair: Pair, repeats: int) -> dict[str, Any]:
    """Measures one pair with Mosaic and, where it takes the pair, with upstream."""
    reason = None
    try:
        ranks = run_ranks(carry_on_rank, WORLD_SIZE, pair, repeats, True, timeout_s=TIMEOUT_S)
        reason = ranks[0].get("reason")
    except RanksError as error:
        if "upstream delivers" not in str(error):
            raise
        reason = "delivers other rows or gradients than the layouts say"
        ranks = run_ranks(carry_on_rank, WORLD_SIZE, pair, repeats, False, timeout_s=TIMEOUT_S)
    least = [least_rows(pair, rank) for rank in range(WORLD_SIZE)]
    result: dict[str, Any] = {
        "source": str(pair.source),
        "destination": str(pair.destination),
        "ranks": pair.ranks,
        "items": list(pair.items),
        "rows": len(rows_of(pair)),
        "tp_replicas": [pair.source.tp, 1 if pair.destination.sp else pair.destination.tp],
        "least_bytes": [sum(rows) * ROW_BYTES for rows in zip(*least, strict=True)],
        "mosaic": _mosaic(ranks, least),
        "upstream": _upstream(ranks, least) if reason is None else None,
        "upstream_reason": reason,
    }
    if reason is None:
        mosaic, theirs_s = result["mosaic"], result["upstream"]["median_s"]
        result["time_ratio"] = mosaic["median_s"] / theirs_s
        result["time_ratio_derived"] = mosaic["median_s_derived"] / theirs_s
    return result


def _mosaic(ranks: Sequence[dict[str, Any]], least: Sequence[tuple[int, int]]) -> dict[str, Any]:
    received = [[rank["mosaic"]["bytes"][way] for rank in ranks] for way in (0, 1)]
    return {
        "bytes": [sum(way) for way in received],
        "ratio": [
            _ratio(sum(received[way]), sum(rows[way] for rows in least) * ROW_BYTES)
            for way in (0, 1)
        ],
        "worst_rank_ratio": [
            max(
                _ratio(num, rows[way] * ROW_BYTES)
                for num, rows in zip(received[way], least, strict=True)
            )
            for way in (0, 1)
        ],
        "most_rows_beyond": max(
            num / ROW_BYTES - rows[way]
            for way in (0, 1)
            for num, rows in zip(received[way], least, strict=True)
        ),
        "median_s": _median_s(ranks, "mosaic"),
        "median_s_derived": _median_s(ranks, "derived"),
    }


def _upstream(ranks: Sequence[dict[str, Any]], least: Sequence[tuple[int, int]]) -> dict[str, Any]:
    received = sum(sum(rank["upstream"]["bytes"]) for rank in ranks)
    return {
        "bytes": received,
        "ratio": _ratio(received, sum(map(sum, least)) * ROW_BYTES),
        "median_s": _median_s(ranks, "upstream"),
    }


def _ratio(received: float, least: float) -> float:
    if least == 0:
        return 1.0 if received == 0 else float("inf")
    return received / least


def _median_s(ranks: Sequence[dict[str, Any]], carrier: str) -> float:
    """Median over the carries of the slowest rank's seconds."""
    return statistics.median(
        max(carry) for carry in zip(*(rank[carrier]["seconds"] for rank in ranks), strict=True)
    )


def carry_on_rank(rank: int, pair: Pair, repeats: int, with_upstream: bool) -> dict[str, Any]:
    """Carries the rows of one pair with each carrier in turn. Called on every rank.

    Returns:
        Bytes and seconds of each carrier on this rank, or why upstream has none.
    """
    logging.getLogger().setLevel(logging.WARNING)  # upstream tells of every construction
    warnings.simplefilter("ignore")  # and uses what torch has renamed
    mosaic = Mosaic(pair, rank)
    carriers: dict[str, Carrier] = {"mosaic": mosaic, "derived": mosaic.deriving_anew()}
    outcome: dict[str, Any] = {}
    if with_upstream:
        try:
            carriers["upstream"] = upstream(pair, rank)
        except UnsupportedError as error:
            outcome["reason"] = str(error)
    rows = own_rows(pair, rank)
    for name, carrier in carriers.items():
        dist.barrier()
        with record() as entries:
            kept, arrived = carrier.carry(rows)
        check(name, pair, rank, kept=kept, arrived=arrived, rows=rows)
        outcome[name] = {"bytes": _bytes_each_way(name, entries), "seconds": []}
    for repeat in range(WARM_UPS + repeats):
        for name, carrier in carriers.items():
            dist.barrier()
            start_s = time.perf_counter()
            carrier.carry(rows)
            if repeat >= WARM_UPS:
                outcome[name]["seconds"].append(time.perf_counter() - start_s)
    dist.barrier()
    for carrier in carriers.values():
        carrier.destroy()
    return outcome


def check(
    name: str,
    pair: Pair,
    rank: int,
    *,
    kept: torch.Tensor | None,
    arrived: torch.Tensor | None,
    rows: torch.Tensor | None,
) -> None:
    """Compares what a carrier delivered with the rows themselves."""
    expected = sorted(rows_kept(pair, rank))
    if name == "upstream":
        # Whole sequences, from which a rank with sequence parallelism takes its part.
        whole = replace(pair, destination=replace(pair.destination, sp=False))
        expected = sorted(rows_kept(whole, rank))
    delivered = torch.empty(0, HIDDEN_SIZE) if kept is None else kept
    if not torch.equal(delivered, all_rows(pair)[expected]):
        raise AssertionError(f"{name} delivers other rows to rank {rank}")
    if rows is not None and (arrived is None or not torch.equal(arrived, rows)):
        raise AssertionError(f"{name} delivers another gradient to rank {rank}")


def _bytes_each_way(name: str, entries: Sequence[Entry]) -> tuple[float, float]:
    """Bytes of activations and of gradients; upstream's both count as the first."""
    gradients = [
        entry
        for entry in entries
        if name != "upstream" and "mosaic.gradient" in getattr(entry, "communicator", "")
    ]
    both, back = total_received_bytes(entries), total_received_bytes(gradients)
    return both - back, back


def summarize(pairs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Returns the numbers that a reader wants first."""
    compared = [pair for pair in pairs if pair["upstream"] is not None]
    moved = [pair for pair in compared if sum(pair["least_bytes"]) > 0]
    return {
        "pairs": len(pairs),
        "worst_mosaic_ratio": max(max(pair["mosaic"]["ratio"]) for pair in pairs),
        "worst_mosaic_rank_ratio": max(max(pair["mosaic"]["worst_rank_ratio"]) for pair in pairs),
        "most_rows_beyond_least": max(pair["mosaic"]["most_rows_beyond"] for pair in pairs),
        "pairs_that_upstream_takes": len(compared),
        "upstream_ratios": [round(pair["upstream"]["ratio"], 3) for pair in moved],
        "median_time_ratio": statistics.median(pair["time_ratio"] for pair in compared),
        "median_time_ratio_derived": statistics.median(
            pair["time_ratio_derived"] for pair in compared
        ),
        "time_ratios": [round(pair["time_ratio"], 3) for pair in compared],
    }


def print_table(pairs: Sequence[dict[str, Any]], summary: dict[str, Any]) -> None:
    """Prints a row for each pair."""
    table = Table(title="Bytes received / least possible, and time of Mosaic / upstream")
    for name in ("source", "destination", "ranks", "counts"):
        table.add_column(name)
    for name in ("least MiB", "forward", "gradient", "upstream", "time", "derived"):
        table.add_column(name, justify="right")
    table.add_column("why not upstream", overflow="fold")
    for pair in pairs:
        taken = pair["upstream"] is not None
        table.add_row(
            *(pair["source"], pair["destination"], pair["ranks"]),
            "equal" if len(set(pair["items"])) == 1 else "unlike",
            f"{sum(pair['least_bytes']) / 2**20:.2f}",
            *(f"{ratio:.3f}" for ratio in pair["mosaic"]["ratio"]),
            f"{pair['upstream']['ratio']:.2f}" if taken else "",
            f"{pair['time_ratio']:.2f}" if taken else "",
            f"{pair['time_ratio_derived']:.2f}" if taken else "",
            pair["upstream_reason"] or "",
        )
    console = Console(width=160)
    console.print(table)
    console.print(summary)


if __name__ == "__main__":
    main()
