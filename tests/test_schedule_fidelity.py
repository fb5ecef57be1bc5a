"""The harness that runs plans with timed waits, and the numbers that it was committed with."""

import statistics

import pytest

from benchmarks.machine import read_results
from benchmarks.schedule_fidelity import measure, predicted_s
from benchmarks.schedule_summary import numbers
from benchmarks.summary import README
from benchmarks.timed_plans import fidelity_plans, place, timed, upstream_plans
from benchmarks.timed_run import Counts
from megatron_mosaic.schedule.simulate import PassTimes

TIMES = PassTimes(0.005, 0.01)


def test_step_of_the_engine_takes_at_least_its_simulated_time():
    placements = [place("vision", [0]), place("language", [1, 2], pp=2)]
    waits_s = {"vision": TIMES, "language": [TIMES, PassTimes(0.01, 0.01)]}
    plan = timed("", "1f1b", placements, num_microbatches=4, waits_s=waits_s, world_size=3)

    (measured,) = measure([plan], counts=Counts(without_waits=2, with_waits=2))

    # Waits never end early, and each of these stages is on one rank.
    assert len(measured["steps_s"]) == 2
    assert min(measured["steps_s"]) >= predicted_s(plan)
    assert measured["processor_s"] > 0


def test_waits_of_a_plan_give_its_simulated_time():
    placements = [place("vision", [0]), place("language", [1])]
    plan = timed(
        "",
        "1f1b",
        placements,
        num_microbatches=3,
        waits_s={"vision": TIMES, "language": TIMES},
        world_size=2,
    )

    # One stage before the last: 5 ms, then 3 x 15 ms of the language model, then 10 ms back.
    assert predicted_s(plan) == pytest.approx(0.060)


def test_all_tasks_of_the_plans_take_20_ms():
    waits_s = {s for plan in fidelity_plans() for times in plan.tasks_s.values() for s in times}

    assert min(waits_s - {0.0}) >= 0.02


def test_readme_has_the_committed_numbers():
    assert numbers() in README.read_text()


def test_committed_simulation_is_near_the_measured_steps():
    results = read_results("schedule_fidelity")

    errors = [abs(row["measured_s"] / row["predicted_s"] - 1) for row in results["plans"]]
    assert [row["plan"] for row in results["plans"]] == [plan.name for plan in fidelity_plans()]
    assert len(errors) >= 12
    assert statistics.median(errors) <= 0.03
    assert max(errors) <= 0.06


def test_committed_simulation_is_that_of_the_plans():
    results = read_results("schedule_fidelity")

    for row, plan in zip(results["plans"], fidelity_plans(), strict=True):
        assert row["predicted_s"] == pytest.approx(predicted_s(plan))


def test_engine_is_as_fast_as_upstream_in_the_committed_run():
    results = read_results("upstream_schedules")

    assert [row["plan"] for row in results["plans"]] == [plan.name for plan in upstream_plans()]
    for row in results["plans"]:
        assert row["mosaic_s"] <= row["upstream_s"] * (1 + row["noise"]), row["plan"]


def test_executed_gain_of_frozen_splits_is_the_simulated_one_in_the_committed_run():
    results = read_results("frozen_execution")

    assert {row["case"] for row in results["cases"]} == {"SSS", "MMS", "MMM", "LLL"}
    for row in results["cases"]:
        executed = row["executed_s"][1] / row["executed_s"][0]
        simulated = row["simulated_s"][1] / row["simulated_s"][0]
        assert executed > 1
        assert abs(executed / simulated - 1) <= 0.05
