"""A step as a trace for Perfetto."""

import json
from bisect import bisect_right
from collections import defaultdict

import pytest

from megatron_mosaic.cli import main
from megatron_mosaic.report.perfetto import trace_events
from megatron_mosaic.report.prediction import read_prediction
from megatron_mosaic.report.step import read_step
from tests.report.plans import PLAN, PREDICTED, lanes_plan, large_plan, small_plan, write_trace


def events_of(plan, trace=None):
    prediction = read_prediction(plan)
    return trace_events(read_step(plan, prediction, trace=trace), prediction)


def counter(events, pid, name):
    """Times in seconds and values of a counter."""
    own = [e for e in events if e["ph"] == "C" and (e["pid"], e["name"]) == (pid, name)]
    return [(event["ts"] / 1e6, event["args"]["GiB"]) for event in own]


def test_trace_names_kinds_of_ranks_and_measured_ranks(tmp_path):
    plan = small_plan()
    write_trace(plan, tmp_path / "trace")

    events = events_of(plan, tmp_path / "trace")

    names = {
        (event["name"], event["pid"], event["tid"]): event["args"].get("name")
        for event in events
        if event["ph"] == "M"
    }
    assert names["process_name", 0, 0] == "ranks 0-1: vision.0"
    assert names["process_name", 2, 0] == "rank 3: language.1"
    assert names["thread_name", 0, 0] == "simulated"
    assert names["thread_name", 0, 2] == "rank 1, measured"


def test_trace_has_the_times_of_tasks_in_microseconds():
    slices = [event for event in events_of(small_plan()) if event["ph"] == "X"]

    # vF0 1 s, transfer 1 s, F0 on both stages 2 s, B0 4 s, transfer 1 s, vB0 1 s.
    found = next(s for s in slices if s["pid"] == 0 and s["cat"] == "backward")
    assert (found["name"], found["ts"], found["dur"]) == ("B0 vision.0", 9_000_000, 1_000_000)
    assert found["args"] == {"stage": "vision.0", "microbatches": [0], "after": "B0 language.0"}


def test_trace_has_a_thread_for_every_lane(tmp_path):
    write_trace(lanes_plan(), tmp_path / "trace")

    events = events_of(lanes_plan(), tmp_path / "trace")

    names = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert names == {
        (0, 0): "simulated, vision.0",
        (0, 1): "simulated, language.0",
        (1, 0): "simulated, vision.0",
        (1, 1): "simulated, language.1",
        (0, 2): "rank 0, measured, vision.0",
        (0, 3): "rank 0, measured, language.0",
        (1, 4): "rank 1, measured, vision.0",
        (1, 5): "rank 1, measured, language.1",
    }
    found = {(e["pid"], e["tid"], e["name"].split()[1]) for e in events if e["ph"] == "X"}
    assert found == {(pid, tid, name.split()[-1]) for (pid, tid), name in names.items()}


@pytest.mark.parametrize(
    "plan",
    [small_plan(), large_plan(), lanes_plan()],
    ids=["4 ranks", "4096 ranks", "lanes"],
)
def test_trace_is_of_the_form_that_viewers_read(plan):
    events = events_of(plan)

    last_us, ends_us, arrows = 0, defaultdict(int), defaultdict(list)
    slices = defaultdict(list)
    for event in events:
        assert isinstance(event["name"], str)
        assert isinstance(event["pid"], int)
        if event["ph"] == "M":
            assert event["args"]
            continue
        assert event["ts"] >= last_us  # in the order of time
        last_us = event["ts"]
        if event["ph"] == "C":
            assert all(isinstance(value, float) for value in event["args"].values())
            continue
        thread = event["pid"], event["tid"]
        if event["ph"] == "X":
            assert event["dur"] >= 0
            assert event["ts"] >= ends_us[thread]  # tasks of a thread do not overlap
            ends_us[thread] = event["ts"] + event["dur"]
            slices[thread].append(event)
        else:
            arrows[event["id"]].append(event)
    assert arrows
    for start, end in arrows.values():
        assert (start["ph"], end["ph"]) == ("s", "f")
        for event in (start, end):
            own = slices[event["pid"], event["tid"]]
            around = own[bisect_right(own, event["ts"], key=lambda each: each["ts"]) - 1]
            assert around["ts"] <= event["ts"] <= around["ts"] + around["dur"]


def test_counters_are_what_stays_and_what_live_tasks_hold():
    # language.0 has weights 30, optimizer 10 GiB, and 5 GiB of each task from the beginning of its
    # forward to the end of its backward pass: F0 2 to 3, F1 3 to 4, B0 6 to 8, F2 8 to 9 s.
    events = events_of(small_plan())

    assert counter(events, 1, "memory of a rank")[:5] == [
        (0, 40.0),
        (2, 45.0),
        (3, 50.0),
        (8, 50.0),  # F2 begins as B0 ends
        (11, 45.0),
    ]
    assert counter(events, 1, "activations of language")[-1] == (18, 0.0)
    assert counter(events, 1, "activations of vision") == []


def test_counters_of_measured_ranks_follow_their_tasks(tmp_path):
    write_trace(small_plan(), tmp_path / "trace", slower=2.0)

    events = events_of(small_plan(), tmp_path / "trace")

    name = "memory of rank 2 at measured times"
    assert counter(events, 1, name)[:3] == [(0, 40.0), (4, 45.0), (6, 50.0)]


def test_plan_that_predicts_no_memory_has_no_counters():
    assert [event for event in events_of(small_plan("")) if event["ph"] == "C"] == []


def test_show_writes_a_trace_with_one_event_for_every_task(tmp_path):
    plan, output = tmp_path / "plan.yaml", tmp_path / "trace.json"
    plan.write_text(PLAN + PREDICTED)

    status = main(["show", str(plan), "-o", str(output)])

    document = json.loads(output.read_text())
    assert status == 0
    assert document["displayTimeUnit"] == "ms"
    # Three kinds of ranks, four microbatches forward and backward.
    assert len([e for e in document["traceEvents"] if e["ph"] == "X"]) == 24


def test_measured_tasks_stand_beside_the_simulated_ones(tmp_path):
    plan = small_plan()
    write_trace(plan, tmp_path / "trace", slower=2.0)

    slices = [e for e in events_of(plan, tmp_path / "trace") if e["ph"] == "X"]

    times = {(e["tid"], e["name"]): e["ts"] for e in slices if e["pid"] == 0}
    assert times[0, "B0 vision.0"] == 9_000_000
    assert times[1, "B0 vision.0"] == 18_000_000
