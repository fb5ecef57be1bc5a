"""Splits of frozen modules, aware of what is frozen or not, on Cornstarch's published stage times.

python -m benchmarks.frozen_partition

The paper gives times of one encoder stage and one LLM stage with and without frozen-awareness, and
iteration times, but not how many stages each module had. Counts are chosen here as the smallest
whole numbers with which the published stage times of the two splits add up to the same work in
either module within ``TOLERANCE``, both splits having equally many stages. A module's layers are
taken as equal; LAYERS_PER_STAGE of them make one stage of the split with more stages.

Two predictions follow. ``published stages``: the step time of 1F1B with the published stage times
in those counts. ``own split``: this package's partition of layers that add up to the published
work (the times of the aware split, whose stages show less contention), once with the true backward
times and once with twice the forward time everywhere, both then timed with the true ones.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from benchmarks.machine import write_results
from megatron_mosaic.cost.pipeline import Hop, PipelineStage, pipeline_s
from megatron_mosaic.planner.partition import Chain, Load, split_chains
from megatron_mosaic.schedule.simulate import PassTimes

NUM_MICROBATCHES = 24
"""Of the paper's scripts, version 1 (24 microbatches of one sample)."""

MOST_STAGES = 12
"""24 GPUs in tensor-parallel pairs, as the paper's scripts have them."""

LAYERS_PER_STAGE = 8
TOLERANCE = 0.06
SOURCE = "Cornstarch, arXiv 2503.11367 v4, table 2"


class StageTimes(NamedTuple):
    """One stage of each module, in seconds."""

    encoder_forward_s: float
    language_forward_s: float
    encoder_backward_s: float
    language_backward_s: float
    iteration_s: float


class Case(NamedTuple):
    """A model, with the stage times of the aware and of the unaware split."""

    name: str
    aware: StageTimes
    unaware: StageTimes


class Counts(NamedTuple):
    """Stages of a split."""

    encoder: int
    language: int


CASES = (
    Case(
        "SSS",
        StageTimes(0.30161, 0.14940, 0.00104, 0.51843, 21.81),
        StageTimes(0.20713, 0.29625, 0.00086, 1.03263, 25.67),
    ),
    Case(
        "MMS",
        StageTimes(0.90386, 0.10261, 0.00272, 0.34654, 40.34),
        StageTimes(0.63556, 0.29762, 0.00119, 1.03212, 41.21),
    ),
    Case(
        "MMM",
        StageTimes(2.33090, 0.27389, 0.00209, 2.41827, 70.37),
        StageTimes(0.71272, 1.15976, 0.00160, 12.11367, 173.01),
    ),
    Case(
        "LLL",
        StageTimes(5.31608, 0.73605, 0.00400, 6.31546, 143.76),
        StageTimes(1.59736, 1.68628, 0.00306, 15.87858, 247.79),
    ),
)


def assumed_counts(case: Case) -> tuple[Counts, Counts, float]:
    """Stages of the aware and the unaware split, and how far the works are apart."""
    best: tuple[float, int, Counts, Counts] | None = None
    for total in range(2, MOST_STAGES + 1):
        for first in range(1, total):
            for second in range(1, total):
                aware, unaware = Counts(first, total - first), Counts(second, total - second)
                error = mismatch(case, aware, unaware)
                # A few per cent are noise: among those the fewest stages.
                rank = max(error, TOLERANCE)
                if best is None or (rank, total) < best[:2]:
                    best = (rank, total, aware, unaware)
    assert best is not None
    return best[2], best[3], mismatch(case, best[2], best[3])


def mismatch(case: Case, aware: Counts, unaware: Counts) -> float:
    """Larger relative difference of the forward work of a module between the two splits."""
    encoder = aware.encoder * case.aware.encoder_forward_s
    encoder /= unaware.encoder * case.unaware.encoder_forward_s
    language = aware.language * case.aware.language_forward_s
    language /= unaware.language * case.unaware.language_forward_s
    return max(abs(encoder - 1), abs(language - 1))


def step_s(stages: Sequence[tuple[float, float]]) -> float:
    """Time of 1F1B over stages one after the other, from their passes."""
    last = len(stages) - 1
    return pipeline_s(
        [
            PipelineStage(forward_s, backward_s, () if s == last else (Hop(s + 1, 0.0),))
            for s, (forward_s, backward_s) in enumerate(stages)
        ],
        num_microbatches=NUM_MICROBATCHES,
    )


def of_published_stages(times: StageTimes, counts: Counts) -> float:
    """Step time with the published stage times."""
    encoder, language = published_stages(times, counts)
    return step_s([*encoder, *language])


def published_stages(times: StageTimes, counts: Counts) -> tuple[list[PassTimes], list[PassTimes]]:
    """Stages of the encoder and of the LLM with the published times."""
    encoder = PassTimes(times.encoder_forward_s, times.encoder_backward_s)
    language = PassTimes(times.language_forward_s, times.language_backward_s)
    return [encoder] * counts.encoder, [language] * counts.language


def of_own_split(case: Case, aware_counts: Counts, *, aware: bool) -> tuple[float, Counts]:
    """Step time of this package's split, and its stages."""
    encoder, language = own_stages(case, aware_counts, aware=aware)
    return step_s([*encoder, *language]), Counts(len(encoder), len(language))


def own_stages(
    case: Case, aware_counts: Counts, *, aware: bool
) -> tuple[list[PassTimes], list[PassTimes]]:
    """Stages of the encoder and of the LLM as this package splits them, with their true times."""
    times, counts = case.aware, aware_counts
    layers = {
        "encoder": _layers(times.encoder_forward_s, times.encoder_backward_s, counts.encoder),
        "language": _layers(times.language_forward_s, times.language_backward_s, counts.language),
    }
    chains = [
        Chain(layers=tuple(Load(f + b if aware else 3 * f) for f, b in parts))
        for parts in layers.values()
    ]
    splits = split_chains(chains, num_stages=sum(aware_counts), num_microbatches=NUM_MICROBATCHES)
    assert splits is not None
    encoder, language = (
        _stages(parts, split.layers_per_stage)
        for parts, split in zip(layers.values(), splits, strict=True)
    )
    return encoder, language


def _stages(
    layers: Sequence[tuple[float, float]], layers_per_stage: Sequence[int]
) -> list[PassTimes]:
    stages, start = [], 0
    for count in layers_per_stage:
        own = layers[start : start + count]
        stages.append(PassTimes(sum(f for f, _ in own), sum(b for _, b in own)))
        start += count
    return stages


def _layers(forward_s: float, backward_s: float, stages: int) -> list[tuple[float, float]]:
    number = LAYERS_PER_STAGE * stages
    return [(forward_s * stages / number, backward_s * stages / number)] * number


def compare(case: Case) -> dict[str, Any]:
    """Predictions for one model beside what was published."""
    aware, unaware, error = assumed_counts(case)
    published_s = [
        of_published_stages(case.aware, aware),
        of_published_stages(case.unaware, unaware),
    ]
    own = [of_own_split(case, aware, aware=True), of_own_split(case, aware, aware=False)]
    return {
        "case": case.name,
        "assumed_stages": {"aware": aware._asdict(), "unaware": unaware._asdict()},
        "work_mismatch": error,
        "published_gain": case.unaware.iteration_s / case.aware.iteration_s,
        "gain_with_published_stages": published_s[1] / published_s[0],
        "gain_of_own_split": own[1][0] / own[0][0],
        "own_stages": {"aware": own[0][1]._asdict(), "unaware": own[1][1]._asdict()},
        "predicted_s": {"aware": published_s[0], "unaware": published_s[1]},
        "published_s": {"aware": case.aware.iteration_s, "unaware": case.unaware.iteration_s},
    }


def main() -> None:
    """Prints the ratios beside the published ones, and writes them."""
    rows = [compare(case) for case in CASES]
    print(f"{SOURCE}; {NUM_MICROBATCHES} microbatches; stages (encoder, LLM) are assumed")
    print("case  aware   unaware  work apart  published  published stages  own split (stages)")
    for row in rows:
        aware, unaware = (tuple(row["assumed_stages"][k].values()) for k in ("aware", "unaware"))
        own = [tuple(row["own_stages"][key].values()) for key in ("aware", "unaware")]
        print(
            f"{row['case']}   {aware}  {unaware}   {row['work_mismatch']:8.1%}  "
            f"{row['published_gain']:8.2f}x  {row['gain_with_published_stages']:15.2f}x  "
            f"{row['gain_of_own_split']:8.2f}x {own[0]} against {own[1]}"
        )
    results = {"source": SOURCE, "num_microbatches": NUM_MICROBATCHES, "cases": rows}
    print(write_results("frozen_partition", results))


if __name__ == "__main__":
    main()
