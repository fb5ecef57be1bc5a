"""A step as a report shows it: simulated, and beside it as measured on some of the ranks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from megatron_mosaic.errors import PlanError
from megatron_mosaic.layout.plan import Plan
from megatron_mosaic.report.prediction import Prediction, predicted_timeline
from megatron_mosaic.report.waits import last_inputs
from megatron_mosaic.schedule.graph import Stage
from megatron_mosaic.schedule.measured import (
    MeasuredStep,
    measured_times,
    read_trace,
    typical_step,
)
from megatron_mosaic.schedule.program import Integers, Program
from megatron_mosaic.schedule.simulate import PassTimes, Seconds, Span, Timeline
from megatron_mosaic.schedule.task import Task

_MOST_MEASURED_RANKS = 64


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class MeasuredRow:
    """A rank as it ran.

    Args:
        rank: The rank.
        kind: Its kind, as a position in the program's.
        index: Its tasks, as positions in the program, in the order in which they ran.
        start_s: When each started.
        end_s: When it ended.
    """

    rank: int
    kind: int
    index: Integers
    start_s: Seconds
    end_s: Seconds


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Measured:
    """A measured step.

    Args:
        step: Which of the run's it is.
        steps_s: Time from the first task to the last one, of every step of the trace but the
            first, in which kernels and caches warm up.
        rows: Its ranks: all, or of many the first one of each kind.
        num_ranks: Ranks that the trace has.
        after: For every task the one that it waited for last.
        tasks_s: Median durations of the longest tasks of every stage.
    """

    step: int
    steps_s: Sequence[float]
    rows: tuple[MeasuredRow, ...]
    num_ranks: int
    after: Integers
    tasks_s: Mapping[Stage, PassTimes]

    @property
    def makespan_s(self) -> float:
        """When the last task of the step ends."""
        return max(float(row.end_s.max()) for row in self.rows)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ReportedStep:
    """A step.

    Args:
        timeline: As simulated.
        source: Where the durations of the simulation are from.
        after: For every task of the program the one that it waited for last.
        measured: As measured, if there is a trace.
    """

    timeline: Timeline
    source: str
    after: Integers
    measured: Measured | None


def read_step(plan: Plan, prediction: Prediction, *, trace: Path | None) -> ReportedStep:
    """Simulates a step, and reads what was measured of it.

    Args:
        plan: The plan.
        prediction: What it predicts; durations that it lacks are the measured ones.
        trace: Folder that a run with ``--mosaic-trace`` wrote.

    Raises:
        PlanError: The trace is none, or is of another plan.
    """
    steps = read_trace(trace) if trace else ()
    source = "predicted" if prediction.tasks_s else "example"
    if steps and not prediction.tasks_s:
        source, prediction = "measured", replace(prediction, tasks_s=measured_times(steps))
    timeline = predicted_timeline(plan, prediction)
    edges = timeline.program.edges
    edge_s = np.array([prediction.transfers_s.get(str(edge), 0.0) for edge in edges])
    return ReportedStep(
        timeline=timeline,
        source=source,
        after=last_inputs(timeline.program, end_s=timeline.end_s, edge_s=edge_s),
        measured=_measured(timeline.program, steps) if steps else None,
    )


def _measured(program: Program, steps: Sequence[MeasuredStep]) -> Measured:
    warm = steps[1:] or steps
    step = typical_step(warm)
    kind_of = {rank: k for k, kind in enumerate(program.kinds) for rank in kind.ranks}
    positions = [
        {program.task(n): n for n in program.tasks_of(kind).tolist()} for kind in program.kinds
    ]
    rows = [
        _row(rank, spans, kind=kind_of.get(rank), positions=positions)
        for rank, spans in step.spans.items()
    ]
    return Measured(
        step=step.number,
        steps_s=tuple(each.makespan_s for each in warm),
        rows=tuple(rows if len(rows) <= _MOST_MEASURED_RANKS else _first_of_kinds(rows)),
        num_ranks=len(rows),
        after=last_inputs(program, end_s=_latest_ends(program, rows)),
        tasks_s=measured_times(warm),
    )


def _row(
    rank: int,
    spans: Sequence[Span],
    *,
    kind: int | None,
    positions: Sequence[Mapping[Task, int]],
) -> MeasuredRow:
    """Finds a rank's tasks among those of its kind; idle ranks have no kind."""
    own = {} if kind is None else positions[kind]
    unknown = next((span.task for span in spans if span.task not in own), None)
    if unknown is not None:
        raise _other_plan(rank, f"task={unknown}")
    if kind is None or len({span.task for span in spans}) != len(own) or len(spans) != len(own):
        raise _other_plan(rank, f"num_tasks={len(spans)}")
    return MeasuredRow(
        rank=rank,
        kind=kind,
        index=np.array([own[span.task] for span in spans]),
        start_s=np.array([span.start_s for span in spans]),
        end_s=np.array([span.end_s for span in spans]),
    )


def _other_plan(rank: int, found: str) -> PlanError:
    return PlanError(
        f"trace: {found} of rank {rank} must be as in the plan's schedule; "
        f"give the plan that the traced run had"
    )


def _first_of_kinds(rows: Sequence[MeasuredRow]) -> list[MeasuredRow]:
    firsts: dict[int, MeasuredRow] = {}
    for row in rows:
        firsts.setdefault(row.kind, row)
    return list(firsts.values())


def _latest_ends(program: Program, rows: Sequence[MeasuredRow]) -> Seconds:
    """When the last of its ranks ended each task; nan where no rank with the task was traced."""
    end_s = np.full(len(program.tasks.stage), np.nan)
    for row in rows:
        end_s[row.index] = np.fmax(end_s[row.index], row.end_s)
    return end_s
