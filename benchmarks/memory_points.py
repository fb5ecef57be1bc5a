"""Published memory of training runs, and what the cost model says of it."""

from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

from benchmarks.published_points import Case, cases_of, read_points
from megatron_mosaic.cost.memory import live_tasks, module_parts, stages_memory

GIB = 2**30
BYTES_PER_WEIGHT = 18  # fp16 weight, fp32 gradient and its sum, fp32 master and two moments


class MemoryError_(NamedTuple):
    """A published number of bytes and the estimated one."""

    case: Case
    published_bytes: float
    estimated_bytes: float

    @property
    def error(self) -> float:
        """Relative error."""
        return self.estimated_bytes / self.published_bytes - 1


def peaks_bytes(case: Case) -> list[float]:
    """Peaks of the stages of a case's language model, in bytes."""
    parts = module_parts(
        case.model.language,
        sizes=case.sizes,
        settings=case.settings,
        samples=case.micro_batch_size,
        precision=case.model.precision,
    )
    stages = stages_memory(
        parts, sizes=case.sizes, settings=case.settings, precision=case.model.precision
    )
    number = case.global_batch_size // case.micro_batch_size // case.sizes.dp
    return [
        stage.total(
            live_tasks=live_tasks(
                index, num_stages=len(stages), num_microbatches=number, chunks=case.sizes.chunks
            )
        )
        for index, stage in enumerate(stages)
    ]


if __name__ == "__main__":
    cases, skipped = cases_of(point for point in read_points() if "mem" in point.fields["metric"] or "peak" in point.fields["metric"])
    for case in cases:
        if case.metric=="peak_alloc_gib" and case.source=="simumax":
            p=peaks_bytes(case)
            print(case.point.fields["source"].split("case ")[1].split(";")[0], case.value, [round(x/GIB,2) for x in p], f"{max(p)/GIB/case.value-1:+.2%}")
