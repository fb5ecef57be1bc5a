"""Traces by the host's clock, and by that of a device which lags behind the host."""

import json

import pytest

from megatron_mosaic.engine.progress import Progress
from megatron_mosaic.engine.trace import DeviceClock, HostClock, TaskTrace, remove_former_ranks
from megatron_mosaic.schedule.measured import read_trace
from megatron_mosaic.schedule.steps import Compute, Edge, Post, Transfer
from megatron_mosaic.schedule.task import Task

FORWARD, BACKWARD = Task("F", "language", 0, (0,)), Task("B", "language", 0, (0,))


class Device:
    """A device that works through what it was given, and is seen to have come to ``now_s``."""

    def __init__(self):
        self.now_s = self.given_until_s = 0.0
        self.synchronized = 0

    def work(self, duration_s):
        self.given_until_s += duration_s

    def synchronize(self):
        self.synchronized += 1
        self.now_s = self.given_until_s = max(self.now_s, self.given_until_s)

    def event(self):
        return Event(self)


class Event:
    def __init__(self, device):
        self.device = device

    def record(self):
        self.at_s = self.device.given_until_s

    def query(self):
        return self.at_s <= self.device.now_s

    def elapsed_time(self, later):
        assert self.query()  # as CUDA raises
        assert later.query()
        return 1000 * (later.at_s - self.at_s)


def _trace_on(device, folder):
    clock = DeviceClock(new_event=device.event, synchronize=device.synchronize)
    return TaskTrace(folder, rank=0, clock=clock)


def _walk(trace, device, *durations_s):
    trace.begin_step(forward_only=False)
    for task, duration_s in zip((FORWARD, BACKWARD), durations_s, strict=False):
        trace.begin_task()
        device.work(duration_s)
        trace.end_task(task)


def _lengths(step):
    return [round(end_s - start_s, 6) for _, start_s, end_s in step.spans[0]]


def test_tasks_last_as_long_as_on_the_device(tmp_path):
    device = Device()
    with _trace_on(device, tmp_path) as trace:
        _walk(trace, device, 2.0, 3.0)

    (step,) = read_trace(tmp_path)
    assert [task for task, *_ in step.spans[0]] == [FORWARD, BACKWARD]
    assert _lengths(step) == [2.0, 3.0]


def test_trace_waits_for_the_device_at_the_first_step_and_the_end_only(tmp_path):
    device = Device()
    with _trace_on(device, tmp_path) as trace:
        for _ in range(5):
            _walk(trace, device, 1.0)
        assert device.synchronized == 1

    assert device.synchronized == 2


def test_steps_are_written_once_the_device_has_done_them(tmp_path):
    device = Device()
    with _trace_on(device, tmp_path) as trace:
        _walk(trace, device, 1.0)
        _walk(trace, device, 1.0)
        assert (tmp_path / "rank0.jsonl").read_text() == ""  # one second after the other to do

        device.now_s = 1.5
        _walk(trace, device, 1.0)

        assert [step.number for step in read_trace(tmp_path)] == [0]


def test_steps_of_a_busy_device_are_apart_as_on_the_device(tmp_path):
    device = Device()
    with _trace_on(device, tmp_path) as trace:
        _walk(trace, device, 1.0)
        device.work(4.0)  # an optimizer, for which the host does not wait
        _walk(trace, device, 1.0)

    begins_s = [_first_start_s(tmp_path, line) for line in (0, 1)]
    assert begins_s[1] - begins_s[0] == pytest.approx(5.0, abs=1e-6)


def test_step_that_finds_the_device_idle_starts_by_the_clock_of_the_host(tmp_path, monkeypatch):
    device = Device()
    host_s = iter((100.0, 200.0))
    monkeypatch.setattr(HostClock, "mark", lambda self: next(host_s))
    with _trace_on(device, tmp_path) as trace:
        _walk(trace, device, 1.0)
        device.synchronize()
        _walk(trace, device, 1.0)

    assert [_first_start_s(tmp_path, line) for line in (0, 1)] == [100.0, 200.0]


def _first_start_s(folder, line):
    return json.loads((folder / "rank0.jsonl").read_text().splitlines()[line])["start_s"]


def test_trace_after_an_error_waits_for_nothing(tmp_path):
    device = Device()
    trace = _trace_on(device, tmp_path)
    _walk(trace, device, 1.0)
    trace.__exit__(KeyError, KeyError("lost"), None)

    assert device.synchronized == 1
    assert (tmp_path / "rank0.jsonl").read_text() == ""


def test_trace_of_a_device_that_failed_leaves_the_error_as_it_was(tmp_path, monkeypatch):
    def fail(self):
        raise RuntimeError("CUDA error: device-side assert triggered")

    trace = _trace_on(device := Device(), tmp_path)
    _walk(trace, device, 1.0)
    monkeypatch.setattr(Event, "query", fail)

    assert trace.__exit__(KeyError, KeyError("lost"), None) is None


def test_trace_of_a_run_on_more_ranks_is_not_mixed_with_the_next_one(tmp_path):
    for rank in range(3):
        with TaskTrace(tmp_path, rank=rank, clock=HostClock()) as trace:
            trace.begin_step(forward_only=False)
            trace.begin_task()
            trace.end_task(FORWARD)

    remove_former_ranks(tmp_path, world_size=2)

    (step,) = read_trace(tmp_path)
    assert list(step.spans) == [0, 1]


def test_evaluation_is_not_traced(tmp_path):
    with TaskTrace(tmp_path, rank=0, clock=HostClock()) as trace:
        trace.begin_step(forward_only=True)
        trace.begin_task()
        trace.end_task(FORWARD)

    assert (tmp_path / "rank0.jsonl").read_text() == ""


def test_progress_traces_tasks_and_not_transfers(tmp_path):
    post = Post(Transfer("activation", Edge("vision", 0, "language", 0), 0))
    with TaskTrace(tmp_path, rank=3, clock=HostClock()) as trace:
        progress = Progress(trace=trace)
        progress.begin_step(1, num_microbatches=1, forward_only=False)
        for position, step in enumerate((post, Compute(FORWARD))):
            progress.begin(position, step)
            progress.end(step)

    (measured,) = read_trace(tmp_path)
    assert [task for task, *_ in measured.spans[3]] == [FORWARD]
