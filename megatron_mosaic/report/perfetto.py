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

_Event = dict[str, Any]
_Thread = tuple[int, int]  # process and thread


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

    A kind of ranks is a process. Its first threads are the lanes of the simulated step, one where
    modules take turns, and those of each measured rank follow. An arrow leads to a task from the
    one that it waited for on other ranks or in another lane. Counters
    of the process are the memory of one of its ranks, and in it the activations of each module.

    Returns:
        Names first, then what happens, in the order of time.
    """
    names = list(_names(step))
    counters = [*_simulated_memory(step, prediction), *_measured_memory(step, prediction)]
    events = [*counters, *_simulated_events(step), *_measured_events(step)]
    return names + sorted(events, key=lambda event: event["ts"])


def _names(step: ReportedStep) -> Iterator[_Event]:
    program = step.timeline.program
    for pid, kind in enumerate(program.kinds):
        stages = " ".join(show_stages(kind.stages))
        yield _name("process_name", pid, name=f"{ranks_text(show_ranks(kind.ranks))}: {stages}")
        yield _name("process_sort_index", pid, sort_index=pid)
        for tid, name in _lane_names(program, kind):
            yield _name("thread_name", pid, tid=tid, name=f"simulated{name}")
    first = _first_threads(step)
    for row in _measured_rows(step):
        for lane, name in _lane_names(program, program.kinds[row.kind]):
            tid = first[row.rank] + lane
            yield _name("thread_name", row.kind, tid=tid, name=f"rank {row.rank}, measured{name}")


def _lane_names(program: Program, kind: RankKind) -> Iterator[tuple[int, str]]:
    """Numbers of the lanes of a kind of ranks, and what to add to the name of a thread."""
    lanes = program.lane_tasks(kind)
    for number, lane in enumerate(lanes):
        yield number, f", {' '.join(show_stages(lane.stages))}" if len(lanes) > 1 else ""


def _name(what: str, pid: int, *, tid: int = 0, **args: Any) -> _Event:
    return {"name": what, "ph": "M", "pid": pid, "tid": tid, "args": args}


def _measured_rows(step: ReportedStep) -> tuple[MeasuredRow, ...]:
    return step.measured.rows if step.measured else ()


def _first_threads(step: ReportedStep) -> Mapping[int, int]:
    """The first thread of every measured rank: they stand behind those of the simulated lanes."""
    program = step.timeline.program
    most = max(len(program.lane_tasks(kind)) for kind in program.kinds)
    return {row.rank: most * (1 + row.rank) for row in _measured_rows(step)}


def _lane_of_tasks(program: Program, kind: RankKind) -> dict[int, int]:
    """Number of the lane in which ranks of a kind run each of their tasks."""
    lanes = program.lane_tasks(kind)
    return {task: n for n, lane in enumerate(lanes) for task in lane.tasks.tolist()}


def _simulated_events(step: ReportedStep) -> Iterator[_Event]:
    timeline = step.timeline
    program = timeline.program
    lanes = [_lane_of_tasks(program, kind) for kind in program.kinds]
    first_kind = {task: pid for pid, own in reversed([*enumerate(lanes)]) for task in own}
    for pid, own in enumerate(lanes):
        for task in sorted(own):
            times = float(timeline.start_s[task]), float(timeline.end_s[task])
            yield _slice(program, task, (pid, own[task]), *times, step.after)
            before = int(step.after[task])
            if before != START and own.get(before) != own[task]:
                source = pid if before in own else first_kind[before]
                ends = (source, lanes[source][before]), (pid, own[task])
                yield from _arrow(step, before, task, *ends)


def _measured_events(step: ReportedStep) -> Iterator[_Event]:
    if step.measured is None:
        return
    program, first = step.timeline.program, _first_threads(step)
    lanes = [_lane_of_tasks(program, kind) for kind in program.kinds]
    for row in step.measured.rows:
        times = zip(row.index.tolist(), row.start_s, row.end_s, strict=True)
        for task, start_s, end_s in times:
            thread = row.kind, first[row.rank] + lanes[row.kind][task]
            yield _slice(program, task, thread, start_s, end_s, step.measured.after)


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
    program: Program, index: int, thread: _Thread, start_s: float, end_s: float, after: Integers
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
        "pid": thread[0],
        "tid": thread[1],
        "ts": _us(start_s),
        "dur": _us(end_s) - _us(start_s),
        "args": args,
    }


def _arrow(
    step: ReportedStep, before: int, task: int, source: _Thread, thread: _Thread
) -> Iterator[_Event]:
    """The two ends of an arrow; each lies inside the slice that it belongs to."""
    timeline = step.timeline
    arrow = {"name": "waits for", "cat": "wait", "id": f"{thread[0]}.{task}"}
    start_us = _inside(timeline.start_s, timeline.end_s, before)
    yield {**arrow, "ph": "s", "pid": source[0], "tid": source[1], "ts": start_us}
    end_us = _us(timeline.start_s[task])
    yield {**arrow, "ph": "f", "bp": "e", "pid": thread[0], "tid": thread[1], "ts": end_us}


def _inside(start_s: Seconds, end_s: Seconds, task: int) -> float:
    """A time within a task, near its end."""
    return _us(start_s[task]) + 0.9 * (_us(end_s[task]) - _us(start_s[task]))


def _us(value_s: float) -> int:
    return round(float(value_s) * 1e6)
