"""Recomputes published step times and memory with the cost model, and prints how far it is off.

``python -m benchmarks.cost_accuracy [--points FILE.csv] [--rows] [--releases]``
"""

import argparse
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean

from scipy.stats import spearmanr

from benchmarks.accuracy_chart import draw
from benchmarks.halves import FITTED, fitted_cases, halves
from benchmarks.heterogeneous_gain import print_gains
from benchmarks.machine import RESULTS, write_results
from benchmarks.memory_points import memory_rows, memory_summaries
from benchmarks.predictions import predict
from benchmarks.published_points import POINTS, Case, Skipped, cases_of, newest, read_points
from megatron_mosaic.cost.costs import StepBreakdown
from megatron_mosaic.cost.model_flops import model_flops_per_token, step_flops_per_token
from megatron_mosaic.errors import LayoutError, PlanError
from megatron_mosaic.model.shipped import load_model
from megatron_mosaic.model.tokens import Distribution


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One published time beside its estimate.

    Args:
        case: The row.
        half: ``A`` is what constants were fitted to, ``B`` the rest of the same sources, ``-``
            everything else.
        estimate: The step as the cost model sees it.
    """

    case: Case
    half: str
    estimate: StepBreakdown

    @property
    def published_s(self) -> float:
        """Published seconds of a step."""
        assert self.case.step_s is not None
        return self.case.step_s

    @property
    def error(self) -> float:
        """Relative error; positive where the estimate is too long."""
        return self.estimate.step_s / self.published_s - 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """Errors of some rows.

    Args:
        rows: How many.
        mape: Mean of absolute relative errors.
        largest: The largest of them.
        bias: Mean of the errors with their signs.
        rank: Spearman's correlation of seconds by token between configurations of one model, mean
            over models with at least three, weighted by their number; ``None`` without such.
    """

    rows: int
    mape: float
    largest: float
    bias: float
    rank: float | None


def estimate_rows(cases: Sequence[Case]) -> list[Row]:
    """Estimates cases, and says to which half each belongs."""
    first, second = halves(fitted_cases(read_points()))
    where = {case.layout: "A" for case in first} | {case.layout: "B" for case in second}
    return [
        Row(case=case, half=where.get(case.layout, "-"), estimate=predict(case)) for case in cases
    ]


def summarise(rows: Sequence[Row]) -> Summary:
    """Summarises the errors of some rows."""
    errors = [row.error for row in rows]
    return Summary(
        rows=len(rows),
        mape=mean(map(abs, errors)),
        largest=max(map(abs, errors)),
        bias=mean(errors),
        rank=rank_correlation(rows),
    )


def rank_correlation(rows: Sequence[Row]) -> float | None:
    """Correlates the order of a model's configurations, published and estimated."""
    by_model: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_model[row.case.model.name].append(row)
    total, weight = 0.0, 0
    for same in by_model.values():
        if len(same) < 3:
            continue
        tokens = [
            row.case.global_batch_size * row.case.model.sequence_length / row.case.num_gpus
            for row in same
        ]
        published = [row.published_s / count for row, count in zip(same, tokens, strict=True)]
        estimated = [row.estimate.step_s / count for row, count in zip(same, tokens, strict=True)]
        if len(set(published)) == 1 or len(set(estimated)) == 1:
            continue
        total += len(same) * float(spearmanr(published, estimated).statistic)
        weight += len(same)
    return total / weight if weight else None


def by_source(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Groups rows by source, the dense rows also by whether weights are sharded."""
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        groups[row.case.source].append(row)
    return groups


def describe(row: Row) -> str:
    """One line on one row."""
    case, sizes = row.case, row.case.sizes
    layout = f"tp{sizes.tp} cp{sizes.cp} pp{sizes.pp} vpp{sizes.chunks} ep{sizes.ep}"
    layout += " fsdp" if case.settings.fsdp else ""
    parts = " ".join(
        f"{key.removesuffix('_s')} {value:.3f}" for key, value in asdict(row.estimate).items()
    )
    return (
        f"{row.half} {case.source:15} {case.model.name:17} {case.num_gpus:5}x{case.gpu:5} "
        f"{layout:31} s{case.model.sequence_length:<7} mbs{case.micro_batch_size} "
        f"gbs{case.global_batch_size:<5} {case.model.precision:5} "
        f"{row.published_s:9.3f} s {row.estimate.step_s:9.3f} s {row.error:+7.1%}  {parts}"
    )


def print_summary(name: str, half: str, rows: Sequence[Row]) -> Summary | None:
    """Prints one line of the table."""
    if not rows:
        return None
    summary = summarise(rows)
    rank = "" if summary.rank is None else f"{summary.rank:6.2f}"
    print(
        f"{name:18} {half:6} {summary.rows:4} {summary.mape:7.1%} {summary.largest:7.1%} "
        f"{summary.bias:+7.1%} {rank}"
    )
    return summary


def print_table(rows: Sequence[Row]) -> dict[str, dict[str, object]]:
    """Prints errors by source and half, and returns them for the results."""
    print(f"{'source':18} {'half':6} {'rows':>4} {'MAPE':>7} {'max':>7} {'bias':>7}   rank")
    results: dict[str, dict[str, object]] = {}
    for source, group in by_source(rows).items():
        parts: Mapping[str, Sequence[Row]] = {
            "A": [row for row in group if row.half == "A"],
            "B": [row for row in group if row.half == "B"],
            "all": group,
        }
        results[source] = {
            half: asdict(summary)
            for half, part in parts.items()
            if (summary := print_summary(source, half, part))
        }
    return results


def print_skipped(skipped: Iterable[Skipped]) -> dict[str, int]:
    """Prints which rows are left out, by reason."""
    reasons: dict[str, list[int]] = defaultdict(list)
    for skip in skipped:
        reasons[skip.reason].append(skip.point.line)
    for reason, lines in sorted(reasons.items(), key=lambda item: -len(item[1])):
        shown = ", ".join(map(str, lines[:6])) + (", ..." if len(lines) > 6 else "")
        print(f"left out {len(lines):3}: {reason} (lines {shown})")
    return {reason: len(lines) for reason, lines in reasons.items()}


def print_memory(cases: Iterable[Case]) -> dict[str, dict[str, float]]:
    """Prints errors of memory, to which nothing is fitted, and returns them for the results."""
    summaries = memory_summaries(memory_rows(cases))
    results: dict[str, dict[str, float]] = {}
    for summary in summaries:
        print(
            f"{summary.source:18} {summary.metric:35} {summary.rows:4} {summary.mape:7.2%} "
            f"{summary.largest:7.2%}"
        )
        results[f"{summary.source} {summary.metric}"] = {
            "rows": summary.rows,
            "mape": summary.mape,
            "largest": summary.largest,
        }
    return results


def print_lora_ratio() -> float:
    """Prints the FLOPs of a LoRA step over those of a full one, and returns it."""
    model = load_model("llama-3-70b").language
    full = replace(model, tokens_per_item=Distribution.constant(4096.0))
    adapted = replace(full, trainable=("*lora*",), lora_rank=16)
    whole = model_flops_per_token(full)
    ratio = step_flops_per_token(adapted, pairs_per_token=_SQUAD_LENGTH / 2) / whole
    unpacked = step_flops_per_token(adapted, pairs_per_token=4096 / 2) / whole
    print(
        f"\nLlama-3-70B, LoRA over full fine-tuning, FLOPs: {ratio:.3f}, published 0.645 "
        f"({ratio / 0.645 - 1:+.1%}); the source counts packed samples for LoRA alone: with "
        f"whole sequences for both it would be {unpacked:.3f}"
    )
    return ratio


# Mean of squared lengths over mean length of SQuAD's samples: about 150 words and a question.
_SQUAD_LENGTH = 230


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the errors. Returns 0, or 2 if the points cannot be read."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--points", type=Path, default=POINTS, help="a file of published points")
    parser.add_argument("--rows", action="store_true", help="print every row")
    parser.add_argument("--releases", action="store_true", help="with older releases of a layout")
    args = parser.parse_args(argv)
    try:
        cases, skipped = cases_of(read_points(args.points))
    except (PlanError, LayoutError, OSError) as error:
        print(f"cost_accuracy: {error}", file=sys.stderr)
        return 2
    timed = [case for case in cases if case.step_s]
    rows = estimate_rows(timed if args.releases else newest(timed))
    if args.rows:
        for row in sorted(rows, key=lambda row: (row.case.source, row.case.model.name)):
            print(describe(row))
    print(
        f"half A: every second layout of {', '.join(FITTED)} by source and GPU in the order of "
        f"{POINTS.name}; constants were fitted to it alone"
    )
    results = print_table(rows)
    print(f"{len(rows)} layouts from {len(timed)} rows that state a time or a rate")
    print("memory, to which nothing is fitted:")
    memory = print_memory(cases)
    left = print_skipped(skipped)
    if args.points == POINTS and not args.releases:
        ratio = print_lora_ratio()
        found = print_gains()
        draw(rows, RESULTS / "cost_accuracy.png")
        path = write_results(
            "cost_accuracy",
            {
                "sources": results,
                "memory": memory,
                "left_out": left,
                "lora_flop_ratio": ratio,
                "17_gpus": found,
            },
        )
        print(f"written: {path.name} and cost_accuracy.png")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
