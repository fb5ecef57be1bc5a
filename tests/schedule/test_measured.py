import json

import pytest

from megatron_mosaic.errors import PlanError
from megatron_mosaic.schedule.graph import Stage
from megatron_mosaic.schedule.measured import measured_times, read_trace, typical_step
from megatron_mosaic.schedule.simulate import PassTimes, Span
from megatron_mosaic.schedule.task import Task

ENCODE = Task("F", "vision", 0, (0, 1))
FORWARD, BACKWARD = Task("F", "language", 0, (0,)), Task("B", "language", 0, (0,))


def _line(step, task, start_s, end_s):
    entry = {"step": step, **task._asdict(), "start_s": start_s, "end_s": end_s}
    return json.dumps(entry) + "\n"


def _write(folder, *ranks):
    for rank, lines in enumerate(ranks):
        (folder / f"rank{rank}.jsonl").write_text("".join(lines))
    return folder


def _steps(folder, *durations_s):
    """Steps of one encoder task on rank 0 and two language tasks on rank 1, 100 s apart."""
    rank_0, rank_1 = [], []
    for step, duration_s in enumerate(durations_s):
        begin_s = 1000.0 + 100 * step
        rank_0.append(_line(step, ENCODE, begin_s, begin_s + 1))
        rank_1.append(_line(step, FORWARD, begin_s + 1, begin_s + 1 + duration_s))
        rank_1.append(_line(step, BACKWARD, begin_s + 1 + duration_s, begin_s + 1 + 3 * duration_s))
    return read_trace(_write(folder, rank_0, rank_1))


def test_trace_has_times_since_the_first_task_of_a_step(tmp_path):
    (step,) = _steps(tmp_path, 2.0)

    assert step.number == 0
    assert step.spans == {
        0: (Span(ENCODE, 0.0, 1.0),),
        1: (Span(FORWARD, 1.0, 3.0), Span(BACKWARD, 3.0, 7.0)),
    }
    assert step.makespan_s == 7.0
    assert step.busy_s(1) == 6.0


def test_typical_step_has_the_median_duration(tmp_path):
    # The first step is often the longest: it compiles and opens connections.
    assert typical_step(_steps(tmp_path, 9.0, 2.0, 3.0)).number == 2


def test_durations_are_medians_over_steps(tmp_path):
    times = measured_times(_steps(tmp_path, 9.0, 2.0, 3.0))

    assert times == {
        Stage("vision", 0): PassTimes(1.0, 0.0),  # has no backward tasks
        Stage("language", 0): PassTimes(3.0, 6.0),
    }


def test_durations_are_those_of_a_stages_longest_tasks(tmp_path):
    short = Task("F", "vision", 0, (2,))
    lines = [_line(0, ENCODE, 0.0, 4.0), _line(0, short, 4.0, 6.0)]

    times = measured_times(read_trace(_write(tmp_path, lines)))

    assert times == {Stage("vision", 0): PassTimes(4.0, 0.0)}


def test_trace_leaves_out_a_step_that_a_rank_did_not_end(tmp_path):
    ended = [_line(0, FORWARD, 0.0, 1.0), _line(1, FORWARD, 2.0, 3.0)[:-20]]
    other = [_line(0, ENCODE, 0.0, 1.0), _line(1, ENCODE, 2.0, 3.0)]

    assert [step.number for step in read_trace(_write(tmp_path, ended, other))] == [0]


def test_trace_does_not_ask_for_tasks_of_an_idle_rank(tmp_path):
    (step,) = read_trace(_write(tmp_path, [_line(0, ENCODE, 0.0, 1.0)], []))

    assert list(step.spans) == [0]


def test_folder_without_a_trace_is_an_error(tmp_path):
    with pytest.raises(PlanError, match=r"must hold rank\*.jsonl with a whole step"):
        read_trace(tmp_path)


def test_line_that_is_no_task_is_an_error(tmp_path):
    _write(tmp_path, [_line(0, ENCODE, 0.0, 1.0), '{"step": 1}\n'])

    with pytest.raises(PlanError, match=r"rank0.jsonl: line 2='{\"step\": 1}' must be a task"):
        read_trace(tmp_path)
