"""When tasks ran on real ranks: steps read from the folder that a run wrote its trace into."""

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from megatron_mosaic.errors import PlanError
from megatron_mosaic.schedule.graph import Stage
from megatron_mosaic.schedule.simulate import PassTimes, Span, covered_s
from megatron_mosaic.schedule.task import Task


@dataclass(frozen=True, kw_only=True, slots=True)
class MeasuredStep:
    """A step as it ran.

    Args:
        number: Which of the run's training steps it is, from 0.
        spans: Tasks of every rank that ran any, in their order; seconds since the first task of
            the step began on any rank.
    """

    number: int
    spans: Mapping[int, tuple[Span, ...]]

    @property
    def makespan_s(self) -> float:
        """When the last task ends."""
        return max(span.end_s for own in self.spans.values() for span in own)

    def busy_s(self, rank: int) -> float:
        """Time in which a rank runs tasks; once where several run at the same time."""
        _, start_s, end_s = zip(*self.spans[rank], strict=True)
        return covered_s(np.array(start_s), np.array(end_s))


def read_trace(folder: Path) -> tuple[MeasuredStep, ...]:
    """Reads ``rank<r>.jsonl`` of every rank: all steps that no rank has left out.

    A rank that was ended midway lacks the last step, or a part of its last line.

    Raises:
        PlanError: The folder holds no step, or a line that is not a task.
    """
    found: dict[int, dict[int, list[Span]]] = defaultdict(dict)
    ranks: set[int] = set()
    for path in sorted(folder.glob("rank*.jsonl")):
        rank = int(path.stem.removeprefix("rank"))
        for step, span in _read_rank(path):
            ranks.add(rank)
            found[step].setdefault(rank, []).append(span)
    steps = [_from_zero(n, found[n]) for n in sorted(found) if found[n].keys() == ranks]
    if not steps:
        raise PlanError(
            f"trace: folder={folder} must hold rank*.jsonl with a whole step; "
            f"train with --mosaic-trace {folder}"
        )
    return tuple(steps)


def typical_step(steps: Iterable[MeasuredStep]) -> MeasuredStep:
    """The step of median duration; of two in the middle the longer one."""
    by_duration = sorted(steps, key=lambda step: step.makespan_s)
    return by_duration[len(by_duration) // 2]


def measured_times(steps: Iterable[MeasuredStep]) -> dict[Stage, PassTimes]:
    """Durations for the simulator: the median of a stage's longest tasks over steps and ranks.

    A stage without backward tasks has 0 for them.
    """
    durations_s: dict[tuple[Stage, str, int], list[float]] = defaultdict(list)
    for step in steps:
        for spans in step.spans.values():
            for task, start_s, end_s in spans:
                key = (Stage(task.module, task.stage), task.kind, len(task.microbatches))
                durations_s[key].append(end_s - start_s)
    # Of a stage's tasks the last may have fewer microbatches than the others.
    longest: dict[Stage, int] = defaultdict(int)
    for stage, _, count in durations_s:
        longest[stage] = max(longest[stage], count)
    return {
        stage: PassTimes(*(median(durations_s.get((stage, kind, count), [0.0])) for kind in "FB"))
        for stage, count in longest.items()
    }


def _read_rank(path: Path) -> Iterable[tuple[int, Span]]:
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(keepends=True)):
        if not line.endswith("\n"):
            return  # the rank was ended while it wrote
        try:
            yield _parse(json.loads(line))
        except (KeyError, TypeError, ValueError):
            raise PlanError(
                f"{path}: line {number + 1}={line.strip()[:60]!r} must be a task as --mosaic-trace "
                f"writes it; trace the run again"
            ) from None


def _parse(entry: Mapping[str, Any]) -> tuple[int, Span]:
    task = Task(
        entry["kind"], str(entry["module"]), int(entry["stage"]), tuple(entry["microbatches"])
    )
    return int(entry["step"]), Span(task, float(entry["start_s"]), float(entry["end_s"]))


def _from_zero(number: int, spans: Mapping[int, list[Span]]) -> MeasuredStep:
    zero_s = min(own[0].start_s for own in spans.values())
    return MeasuredStep(
        number=number,
        spans={
            rank: tuple(
                Span(task, start_s - zero_s, end_s - zero_s) for task, start_s, end_s in own
            )
            for rank, own in sorted(spans.items())
        },
    )
