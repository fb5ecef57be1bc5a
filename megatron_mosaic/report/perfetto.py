"""A step as a trace that Perfetto and Chrome open: https://ui.perfetto.dev.

Source:
    Trace Event Format, https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from megatron_mosaic.layout.plan import Plan
from megatron_mosaic.layout.ranks import show_ranks
from megatron_mosaic.report.memory import memory_over_time
from megatron_mosaic.report.prediction import Prediction, read_prediction
from megatron_mosaic.report.step import MeasuredRow, ReportedStep, read_step
from megatron_mosaic.report.units import ranks_text
from megatron_mosaic.schedule.graph import RankKind, show_stages
from megatron_mosaic.schedule.program import START, Integers, Program
from megatron_mosaic.schedule.simulate import Seconds

_SIMULATED = 0  # thread of a process; measured ranks have theirs behind it
_Event = dict[str, Any]


def write_perfetto(plan: Plan, path: Path, *, trace: Path | None = None) -> None:
    """Writes a step as trace events.

    Args:
        plan: The plan.
        path: JSON file to write.
        trace: Folder of a traced run of the plan, to stand beside the simulation.

    Raises:
        PlanError: The prediction or the trace cannot be read.
    """
    prediction = read_prediction(plan)
    step = read_step(plan, prediction, trace=trace)
    document = {"displayTimeUnit": "ms", "traceEvents": trace_events(step, prediction)}
    path.write_text(json.dumps(document, separators=(",", ":")), encoding="utf-8")


def trace_events(step: ReportedStep, prediction: Prediction) -> list[_Event]:
    """Events of a step, times in microseconds.

    A kind of ranks is a process. Its first thread is the simulated step, and each measured rank
    is one more. An arrow leads to a task from the one that it waited for on other ranks. Counters
    of the process are the memory of one of its ranks, and in it the activations of each module.

    Returns:
        Names first, then what happens, in the order of time.
    """
    names = list(_names(step))
    counters = [*_simulated_memory(step, prediction), *_measured_memory(step, prediction)]
    events = [*counters, *_simulated_events(step), *_measured_events(step)]
    return names + sorted(events, key=lambda event: event["ts"])


def _names(step: ReportedStep) -> Iterator[_Event]:
    for pid, kind in enumerate(step.timeline.program.kinds):
        stages = " ".join(show_stages(kind.stages))
        yield _name("process_name", pid, name=f"{ranks_text(show_ranks(kind.ranks))}: {stages}")
        yield _name("process_sort_index", pid, sort_index=pid)
        yield _name("thread_name", pid, name="simulated")
    for row in _measured_rows(step):
        yield _name("thread_name", row.kind, tid=_thread(row), name=f"rank {row.rank}, measured")


def _name(what: str, pid: int, *, tid: int = _SIMULATED, **args: Any) -> _Event:
    return {"name": what, "ph": "M", "pid": pid, "tid": tid, "args": args}


def _measured_rows(step: ReportedStep) -> tuple[MeasuredRow, ...]:
    return step.measured.rows if step.measured else ()


def _thread(row: MeasuredRow) -> int:
    return 1 + row.rank


def _simulated_events(step: ReportedStep) -> Iterator[_Event]:
    timeline = step.timeline
    program = timeline.program
    first_kind = np.zeros(len(timeline.start_s), dtype=np.int64)
    for pid, kind in reversed([*enumerate(program.kinds)]):
        first_kind[program.tasks_of(kind)] = pid
    for pid, kind in enumerate(program.kinds):
        own = program.tasks_of(kind)
        waits_for = _from_elsewhere(program, kind, step.after)
        for task, start_s, end_s in zip(
            own.tolist(), timeline.start_s[own], timeline.end_s[own], strict=True
        ):
            yield _slice(program, task, pid, _SIMULATED, start_s, end_s, step.after)
            if task in waits_for:
                before = waits_for[task]
                yield from _arrow(step, before, task, source=int(first_kind[before]), pid=pid)


def _measured_events(step: ReportedStep) -> Iterator[_Event]:
    if step.measured is None:
        return
    for row in step.measured.rows:
        times = zip(row.index.tolist(), row.start_s, row.end_s, strict=True)
        for task, start_s, end_s in times:
            yield _slice(
                step.timeline.program,
                task,
                row.kind,
                _thread(row),
                start_s,
                end_s,
                step.measured.after,
            )


def _simulated_memory(step: ReportedStep, prediction: Prediction) -> Iterator[_Event]:
    timeline = step.timeline
    for pid, kind in enumerate(timeline.program.kinds):
        own = timeline.program.tasks_of(kind)
        memory = memory_over_time(
            timeline.program,
            prediction,
            rank=kind.ranks[0],
            index=own,
            start_s=timeline.start_s[own],
            end_s=timeline.end_s[own],
        )
        if memory is None:
            continue
        yield from _counter("memory of a rank", pid, memory.time_s, memory.total_bytes)
        for module, size in memory.activations.items():
            yield from _counter(f"activations of {module}", pid, memory.time_s, size)


def _measured_memory(step: ReportedStep, prediction: Prediction) -> Iterator[_Event]:
    """Predicted sizes at measured times: a trace has no sizes."""
    for row in _measured_rows(step):
        memory = memory_over_time(
            step.timeline.program,
            prediction,
            rank=row.rank,
            index=row.index,
            start_s=row.start_s,
            end_s=row.end_s,
        )
        if memory is not None:
            name = f"memory of rank {row.rank} at measured times"
            yield from _counter(name, row.kind, memory.time_s, memory.total_bytes)


def _counter(name: str, pid: int, time_s: Seconds, size: Seconds) -> Iterator[_Event]:
    """A value from each time on; of changes at the same time the last one."""
    last = np.append(np.diff(time_s) > 0, True)
    for at_s, value in zip(time_s[last].tolist(), size[last].tolist(), strict=True):
        gib = round(value / 2**30, 3)
        yield {"name": name, "ph": "C", "pid": pid, "ts": _us(at_s), "args": {"GiB": gib}}


def _slice(
    program: Program, index: int, pid: int, tid: int, start_s: float, end_s: float, after: Integers
) -> _Event:
    task = program.task(index)
    before = int(after[index])
    args: _Event = {"stage": f"{task.module}.{task.stage}", "microbatches": list(task.microbatches)}
    if before != START:
        args["after"] = str(program.task(before))
    return {
        "name": str(task),
        "cat": "backward" if task.kind == "B" else "forward",
        "ph": "X",
        "pid": pid,
        "tid": tid,
        "ts": _us(start_s),
        "dur": _us(end_s) - _us(start_s),
        "args": args,
    }


def _from_elsewhere(program: Program, kind: RankKind, after: Integers) -> Mapping[int, int]:
    """For each task of a kind that waits for one of other ranks, which."""
    own = set(program.tasks_of(kind).tolist())
    return {
        task: int(after[task]) for task in own if after[task] != START and after[task] not in own
    }


def _arrow(
    step: ReportedStep, before: int, task: int, *, source: int, pid: int
) -> Iterator[_Event]:
    """The two ends of an arrow; each lies inside the slice that it belongs to."""
    timeline = step.timeline
    arrow = {"name": "waits for", "cat": "wait", "id": f"{pid}.{task}", "tid": _SIMULATED}
    start_us = _inside(timeline.start_s, timeline.end_s, before)
    yield {**arrow, "ph": "s", "pid": source, "ts": start_us}
    yield {**arrow, "ph": "f", "bp": "e", "pid": pid, "ts": _us(timeline.start_s[task])}


def _inside(start_s: Seconds, end_s: Seconds, task: int) -> float:
    """A time within a task, near its end."""
    return _us(start_s[task]) + 0.9 * (_us(end_s[task]) - _us(start_s[task]))


def _us(value_s: float) -> int:
    return round(float(value_s) * 1e6)
