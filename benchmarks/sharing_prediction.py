"""How far the model of contention is from operations that were measured beside each other.

    python -m benchmarks.sharing_prediction [FILE.json]

The file is what ``benchmarks.sharing_gpu`` writes: of part p1 the memory-bound operations by SM
count give bandwidth, of p2 all pairs are predicted, each by a fit to all the others.
"""

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from benchmarks.machine import RESULTS
from megatron_mosaic.cluster.spec import SharingCurves
from megatron_mosaic.profile.measurements import TimedOperation
from megatron_mosaic.profile.sharing_fit import (
    TimedPair,
    TimedPart,
    bytes_per_s,
    demands_of,
    fit_interference,
    fit_knee,
    fit_rates,
    held_out_error,
)

TARGET = 0.08
"""Mean relative error to stay below."""

_COPY = "gelu"  # one operation of several sizes, whose bytes are as good as all that it does


class CoRunErrors(NamedTuple):
    """Mean relative errors of times beside others.

    Args:
        num_pairs: Pairs that were measured, of which each gives two times.
        interference: Fitted to all.
        held_out: Error of each pair by a fit to all others.
        no_contention: Error of saying that operations do not mind each other.
    """

    num_pairs: int
    interference: float
    held_out: float
    no_contention: float


def co_run_errors(
    curves: Iterable[Mapping[str, Any]], pairs: Iterable[Mapping[str, Any]], *, num_sms: int
) -> CoRunErrors:
    """Predicts every pair from the others.

    Args:
        curves: Rows of operations by SM count.
        pairs: Rows of operations beside each other; at least two that were measured.
        num_sms: Multiprocessors of the GPU.
    """
    parts, timed = parts_of(curves), pairs_of(pairs)
    rates = fit_rates(parts, num_sms=num_sms)
    knee = fit_knee(rates["elementwise"], num_sms=num_sms)
    known = SharingCurves(bandwidth_knee=knee, interference=0.0, rates=rates)
    most = bytes_per_s(parts, num_sms=num_sms)
    demands = [(it, demands_of(it, known, num_sms=num_sms, most=most)) for it in timed]
    ratios = [a / b for it in timed for a, b in zip(it.alone_s, it.beside_s, strict=True)]
    return CoRunErrors(
        num_pairs=len(timed),
        interference=fit_interference(demands),
        held_out=held_out_error(demands),
        no_contention=fmean(abs(ratio - 1) for ratio in ratios),
    )


def parts_of(rows: Iterable[Mapping[str, Any]]) -> list[TimedPart]:
    """Memory-bound operations that ran, of each size one."""
    return [
        TimedPart(TimedOperation("elementwise", row["bytes"], row["median_s"]), row["sms"])
        for row in rows
        if row["operation"].startswith(_COPY) and row.get("median_s")
    ]


def pairs_of(rows: Iterable[Mapping[str, Any]]) -> list[TimedPair]:
    """Pairs that ran beside each other."""
    return [
        TimedPair(
            names=tuple(row["operations"]),
            sms=tuple(row["sms"]),
            moved_bytes=tuple(row["bytes"]),
            alone_s=tuple(row["solo_s"]),
            beside_s=tuple(row["co_run_s"]),
        )
        for row in rows
        if row.get("co_run_s")
    ]


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the errors of a file."""
    parser = argparse.ArgumentParser(description="predicted and measured contention")
    parser.add_argument("file", type=Path, nargs="?", default=RESULTS / "sharing_gpu.json")
    parts = json.loads(parser.parse_args(argv).file.read_text())["parts"]
    rows = parts["p1"]["rows"]
    found = co_run_errors(rows, parts["p2"]["rows"], num_sms=max(row["sms"] for row in rows))
    print(
        f"{found.num_pairs} pairs, interference {found.interference:.3g}: mean error "
        f"{found.held_out:.1%} held out (goal {TARGET:.0%}), {found.no_contention:.1%} if "
        f"operations did not mind each other"
    )


if __name__ == "__main__":
    main()
