"""Published memory of training runs against the cost model's.

    python -m benchmarks.memory_points [FILE.csv]

Nothing is fitted: every byte that is counted has a reason in ``megatron_mosaic/cost``.
"""

import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from benchmarks.published_points import POINTS, Case, cases_of, read_points
from megatron_mosaic.cost.costs import StageMemory
from megatron_mosaic.cost.memory import (
    ModuleParts,
    live_tasks,
    module_parts,
    split_layers,
    stage_memory,
    stages_memory,
)
from megatron_mosaic.cost.sizes import ParallelSizes

GIB = 2**30


class MemoryRow(NamedTuple):
    """A published amount of memory and the estimated one."""

    case: Case
    estimated_bytes: float

    @property
    def published_bytes(self) -> float:
        """What the source says."""
        return self.case.value * GIB

    @property
    def error(self) -> float:
        """How much more is estimated, relative to what the source says."""
        return self.estimated_bytes / self.published_bytes - 1


def memory_rows(cases: Iterable[Case]) -> list[MemoryRow]:
    """Estimates all cases that are about memory."""
    return [MemoryRow(case, estimated_bytes(case)) for case in cases if "_gib" in case.metric]


def estimated_bytes(case: Case) -> float:
    """Estimates what a case's metric means."""
    if case.metric == "peak_alloc_gib":
        return max(peaks_bytes(case))
    layers = _first_layers(case)
    if case.metric == "param_opt_mem_gib":
        return layers.weights + layers.gradients + layers.optimizer
    return layers.activations_per_task * _live(case, stage=0)


def peaks_bytes(case: Case) -> list[float]:
    """Estimates the peak of every stage of a case; encoders are on the first one, as published."""
    peaks = []
    for stage, memory in enumerate(_stages(case, "language", case.sizes)):
        peaks.append(memory.total(live_tasks=_live(case, stage=stage)))
    for name in case.model.modules:
        if name != "language":
            sizes = replace(case.sizes, pp=1, chunks=1, ep=1)
            (encoder,) = _stages(case, name, sizes)
            peaks[0] += encoder.total(live_tasks=_live(case, stage=0)) - encoder.working
    return peaks


def _stages(case: Case, name: str, sizes: ParallelSizes) -> tuple[StageMemory, ...]:
    parts = _parts(case, name, sizes)
    return stages_memory(parts, sizes=sizes, settings=case.settings, precision=case.model.precision)


def _first_layers(case: Case) -> StageMemory:
    """The layers of the first stage alone, which the analytic rows of arXiv 2205.05198 count.

    45.5625 GiB of its 22-billion model, for instance, are 18 * 12*48*6144^2/8 bytes, without
    embedding, norms and biases.
    """
    parts = _parts(case, "language", case.sizes)
    layers = split_layers(parts.layers, [case.model.language.num_layers // case.sizes.pp])[0]
    return stage_memory(
        layers, sizes=case.sizes, settings=case.settings, precision=case.model.precision
    )


def _parts(case: Case, name: str, sizes: ParallelSizes) -> ModuleParts:
    encoders = [module for key, module in case.model.modules.items() if key != "language"]
    return module_parts(
        case.model.modules[name],
        sizes=sizes,
        settings=case.settings,
        samples=case.micro_batch_size,
        precision=case.model.precision,
        gradient_arrives=name == "language" and any(m.trainable != () for m in encoders),
    )


def _live(case: Case, *, stage: int) -> float:
    return live_tasks(
        stage,
        num_stages=case.sizes.pp,
        num_microbatches=case.global_batch_size // (case.micro_batch_size * case.sizes.dp),
        chunks=case.sizes.chunks,
    )


def summary(rows: Iterable[MemoryRow]) -> list[str]:
    """One line for each source and metric: rows, mean and largest error, in per cent."""
    groups: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        groups.setdefault((row.case.source, row.case.metric), []).append(abs(row.error))
    return [
        f"{source:16} {metric:36} {len(errors):3} rows  "
        f"MAPE {100 * sum(errors) / len(errors):6.2f} %  max {100 * max(errors):6.2f} %"
        for (source, metric), errors in groups.items()
    ]


def main(arguments: list[str]) -> None:
    """Prints the errors of a file of points, by source."""
    points = read_points(Path(arguments[0]) if arguments else POINTS)
    cases, skipped = cases_of(p for p in points if "_gib" in p.fields["metric"])
    rows = memory_rows(cases)
    for row in rows:
        sizes = row.case.sizes
        print(
            f"{row.case.model.name:20} tp{sizes.tp} cp{sizes.cp} pp{sizes.pp} dp{sizes.dp} "
            f"ep{sizes.ep} {row.case.metric:36} published {row.case.value:7.2f} GiB  "
            f"estimated {row.estimated_bytes / GIB:7.2f} GiB  {100 * row.error:+6.2f} %"
        )
    for skip in skipped:
        print(f"line {skip.point.line}: {skip.point.fields['model']}: {skip.reason}")
    print("\n".join(summary(rows)))


if __name__ == "__main__":
    main(sys.argv[1:])
