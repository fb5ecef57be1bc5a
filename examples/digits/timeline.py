"""Which module ran on which rank when, read from the traces of a run."""

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True, slots=True)
class Span:
    """One task as it was measured on one rank; times since its step began."""

    rank: int
    kind: str
    module: str
    stage: int
    microbatches: tuple[int, ...]
    start_s: float
    end_s: float


def typical_step(folder: Path) -> tuple[Span, ...]:
    """Reads ``rank<r>.jsonl`` of every rank and picks the step of median duration.

    Raises:
        ValueError: The folder holds no traces.
    """
    steps: dict[int, list[Span]] = defaultdict(list)
    for path in sorted(folder.glob("rank*.jsonl")):
        rank = int(path.stem.removeprefix("rank"))
        for line in path.read_text(encoding="utf-8").splitlines():
            entry = json.loads(line)
            step = entry.pop("step")
            entry["microbatches"] = tuple(entry["microbatches"])
            steps[step].append(Span(rank=rank, **entry))
    if not steps:
        raise ValueError(f"trace: folder={folder} must hold rank*.jsonl; run with --mosaic-trace")
    by_duration = sorted(steps.values(), key=duration_s)
    return _from_zero(by_duration[len(by_duration) // 2])


def duration_s(spans: Sequence[Span]) -> float:
    """Time from the first task's start to the last one's end."""
    return max(span.end_s for span in spans) - min(span.start_s for span in spans)


def _from_zero(spans: Sequence[Span]) -> tuple[Span, ...]:
    zero_s = min(span.start_s for span in spans)
    return tuple(
        Span(
            rank=span.rank,
            kind=span.kind,
            module=span.module,
            stage=span.stage,
            microbatches=span.microbatches,
            start_s=span.start_s - zero_s,
            end_s=span.end_s - zero_s,
        )
        for span in spans
    )
