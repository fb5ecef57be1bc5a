"""A step as a report shows it: what its tasks waited for, and what was measured."""

import json

import numpy as np
import pytest

from megatron_mosaic.errors import PlanError
from megatron_mosaic.report.prediction import read_prediction
from megatron_mosaic.report.step import read_step
from megatron_mosaic.report.summary import key_numbers, summary, waiting_share
from tests.report.plans import PREDICTED, large_plan, small_plan, write_trace


def step_of(plan, trace=None):
    return read_step(plan, read_prediction(plan), trace=trace)


def summary_of(plan, trace=None):
    return summary(read_prediction(plan), step_of(plan, trace))


def position(step, text):
    program = step.timeline.program
    return next(n for n in range(len(program.tasks.stage)) if str(program.task(n)) == text)


@pytest.mark.parametrize(
    ("task", "before"),
    [
        ("F0 language.0", "F0 vision.0"),  # its input
        ("F2 vision.0", "F1 vision.0"),  # its ranks
        ("B0 language.0", "B0 language.1"),  # its gradient
    ],
)
def test_task_waited_for_what_ended_last(task, before):
    step = step_of(small_plan())

    found = step.after[position(step, task)]

    assert str(step.timeline.program.task(int(found))) == before


def test_first_task_waited_for_nothing():
    step = step_of(small_plan())

    assert step.after[position(step, "F0 vision.0")] == -1


@pytest.mark.parametrize("plan", [small_plan(), large_plan()], ids=["4 ranks", "4096 ranks"])
def test_no_task_waited_for_a_later_one(plan):
    step = step_of(plan)

    timeline, some = step.timeline, step.after >= 0
    assert np.all(timeline.end_s[step.after[some]] <= timeline.start_s[some] + 1e-9)


def test_measured_step_is_the_typical_one_after_the_first(tmp_path):
    plan = small_plan()
    write_trace(plan, tmp_path / "trace", slower=1.25, steps=3)

    step = step_of(plan, tmp_path / "trace")

    assert step.measured is not None
    assert step.measured.step in (1, 2)
    assert len(step.measured.steps_s) == 2
    assert [row.rank for row in step.measured.rows] == [0, 1, 2, 3]
    assert step.measured.makespan_s == pytest.approx(1.25 * step.timeline.makespan_s)


def test_plan_without_prediction_takes_the_measured_durations(tmp_path):
    write_trace(small_plan(), tmp_path / "trace", slower=2.0)

    step = step_of(small_plan(""), tmp_path / "trace")

    assert step.source == "measured"
    # A forward task of vision is predicted to take 1 s, and was twice as slow.
    assert step.timeline.end_s[position(step, "F0 vision.0")] == 2.0


def test_trace_of_another_plan_is_refused(tmp_path):
    write_trace(small_plan(), tmp_path / "trace")
    line = {"step": 0, "kind": "F", "module": "audio", "stage": 0, "microbatches": [0]}
    text = json.dumps({**line, "start_s": 0.0, "end_s": 1.0})
    (tmp_path / "trace" / "rank0.jsonl").write_text(f"{text}\n" * 3)

    with pytest.raises(PlanError, match=r"trace: task=F0 audio\.0 of rank 0 must be as in the"):
        step_of(small_plan(), tmp_path / "trace")


def test_trace_with_tasks_missing_is_refused(tmp_path):
    write_trace(small_plan(), tmp_path / "trace", steps=1)
    path = tmp_path / "trace" / "rank3.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))

    with pytest.raises(PlanError, match=r"trace: num_tasks=7 of rank 3 must be as in the plan's"):
        step_of(small_plan(), tmp_path / "trace")


def test_summary_says_what_the_plan_gains_and_pays():
    # Compute 2.0 to 1.0, communication 0.5 to 0.2, bubble 0.5 to 0.7, sync 0 to 0.06 s.
    assert summary_of(small_plan()) == (
        "A step takes 2.00 s, 1.50 times as fast as under the best homogeneous layout (TP2 PP2): "
        "it saves 1.00 s of computing and 300 ms of exposed communication, and pays 200 ms of "
        "waiting, 60 ms of synchronising and 40 ms of the optimizer."
    )


@pytest.mark.parametrize(
    ("predicted", "expected"),
    [
        ("", "The plan file predicts no time of a step, so there is nothing to compare it with."),
        ("predicted: {step_s: 2.0}\n", "A step takes 2.00 s; the plan file names no baseline."),
        (
            "predicted: {step_s: 2.0, baseline_step_s: 2.001}\n",
            "A step takes 2.00 s, as long as under the best homogeneous layout.",
        ),
        (
            PREDICTED.replace("baseline_step_s: 3.0", "baseline_step_s: 1.0").split("  breakdown")[
                0
            ],
            "A step takes 2.00 s, 0.50 times as fast as under the best homogeneous layout.",
        ),
    ],
)
def test_summary_says_no_more_than_is_known(predicted, expected):
    assert summary_of(small_plan(predicted)) == expected


def test_summary_without_a_prediction_says_what_was_measured(tmp_path):
    write_trace(small_plan(), tmp_path / "trace", slower=2.0)

    # Predicted are 20 s, see test_page.py.
    assert summary_of(small_plan(""), tmp_path / "trace") == (
        "The tasks of a measured step take 40.0 s; the plan file predicts no time."
    )


def test_key_numbers_compare_measured_with_simulated(tmp_path):
    plan = small_plan()
    write_trace(plan, tmp_path / "trace", slower=1.25)

    numbers = {
        n.label: n for n in key_numbers(read_prediction(plan), step_of(plan, tmp_path / "trace"))
    }

    assert numbers["against homogeneous"].value == "1.50×"
    assert numbers["fullest GPU"][1:] == ("50.0 GiB", "ranks 2-3 of 80.0 GiB")
    assert "measured +25.0%" in numbers["tasks, measured"].note


def test_waiting_share_is_of_all_ranks():
    step = step_of(small_plan())

    # Two ranks work 4 * 2 s and two 4 * 3 s.
    whole_s = step.timeline.makespan_s
    assert waiting_share(step) == pytest.approx(1 - (2 * 8 + 2 * 12) / (4 * whole_s))


def test_waits_of_the_busiest_rank_stand_beside_the_average():
    step = step_of(small_plan())
    (number,) = (
        n for n in key_numbers(read_prediction(small_plan()), step) if n.label.startswith("ranks")
    )

    # Of 20 s two ranks work 8 s and two 12 s: 10 of 20 s on average, 20 - 12 s at least.
    assert number.value == "50.0%"
    assert number.note == "of the tasks' time; the busiest, which the breakdown is of, 8.00 s"
