"""The benchmark of modules that share a GPU: its statistics, its verdicts, and a dry run."""

import json

import pytest

from benchmarks.sharing.arms import Arm, Bench, affordable, cap_quotas
from benchmarks.sharing.cases import CASES, cases_for
from benchmarks.sharing.choice import document_of
from benchmarks.sharing.curves import blocks_of
from benchmarks.sharing.lanes import LaneBank
from benchmarks.sharing.multiplexing import best_of, nearest_splits, nearest_swapped, thinned
from benchmarks.sharing.results import merge, put_row, rows_of
from benchmarks.sharing.runner import StepRun, plan_of
from benchmarks.sharing.setting import setting_on
from benchmarks.sharing.stats import (
    Interval,
    bound_s,
    fastest,
    gain_interval,
    in_turns,
    median_interval,
    noise,
    recovered_share,
)
from benchmarks.sharing.verdicts import (
    disjoint,
    gaps_filled,
    goal,
    gradients,
    near_best,
    never_slower,
    verdicts,
)
from benchmarks.sharing_gpu import main
from megatron_mosaic.model.model_file import model_from_document


def test_arms_take_turns_forwards_and_backwards():
    order = [name for _, name in in_turns("ABC", rounds=3)]

    assert "".join(order) == "ABCCBAABC"


def test_gain_of_steady_arms_has_no_interval():
    gain = gain_interval([3.0] * 10, [2.0] * 10)

    assert gain == Interval(1.5, 1.5, 1.5)


def test_gain_interval_holds_the_estimate_and_is_the_same_each_time():
    base_s = [1.0, 1.2, 1.1, 1.3, 1.05, 1.15, 1.25, 1.4, 0.95, 1.1]
    arm_s = [0.9, 1.0, 1.05, 1.1, 0.95, 1.02, 0.98, 1.2, 0.93, 1.0]

    gain = gain_interval(base_s, arm_s)

    # Medians are (1.1 + 1.15) / 2 and 1.0.
    assert gain.estimate == pytest.approx(1.125)
    assert gain.low < gain.estimate < gain.high
    assert gain == gain_interval(base_s, arm_s)


def test_rounds_are_resampled_together():
    # Both arms are slow in the same rounds: their ratio is 2 in every sample of rounds.
    drift = [1.0, 5.0, 2.0, 9.0, 4.0, 7.0, 3.0]

    gain = gain_interval([2 * each for each in drift], drift)

    assert gain == Interval(2.0, 2.0, 2.0)


def test_median_interval_of_one_slow_round_leaves_it_out():
    assert median_interval([1.0] * 11 + [50.0]).high == 1.0


def test_fastest_leaves_out_what_did_not_run():
    medians_s = {"A": 2.0, "A'": None, "A batch": 1.5}

    assert fastest(medians_s, ["A", "A'", "A batch"]) == "A batch"
    assert fastest(medians_s, ["A'"]) is None


def test_noise_is_the_farther_end_of_the_control():
    assert noise(Interval(1.0, 0.98, 1.01)) == pytest.approx(0.02)


@pytest.mark.parametrize(
    ("gap_s", "overlapped_s", "share"),
    # 10 s of language and 4 s of encoder, one after the other behind a gap.
    [(2.0, 14.0, 1.0), (2.0, 15.0, 0.5), (6.0, 16.0, 1.0), (6.0, 20.0, 0.0)],
)
def test_recovered_is_over_the_shorter_of_gap_and_encoder(gap_s, overlapped_s, share):
    found = recovered_share(
        serial_s=10 + gap_s + 4, overlapped_s=overlapped_s, gap_s=gap_s, encoder_s=4.0
    )

    assert found == share


def test_bound_is_of_the_busiest_unit_or_of_the_longest_module():
    busy = {"flops": 6e12, "num_bytes": 4e9, "flops_per_s": 1e12, "bytes_per_s": 1e9}

    assert bound_s(**busy, alone_s=[3.0, 5.0]) == 6.0
    assert bound_s(**busy, alone_s=[3.0, 7.0]) == 7.0


def test_thinned_quotas_keep_the_first_and_the_last():
    assert thinned([8, 16, 24, 32, 40, 48, 56], 3) == [8, 32, 56]
    assert thinned([8, 16], 3) == [8, 16]


def test_splits_that_are_scanned_are_nearest_to_the_modules_times(monkeypatch):
    monkeypatch.setattr("benchmarks.sharing.multiplexing.MOST_SPLITS", 2)

    # A quarter of the time is a quarter of 32 SMs.
    assert nearest_splits([(8, 24), (16, 16), (24, 8)], [1.0, 3.0]) == [(8, 24), (16, 16)]


def test_splits_next_to_the_best_give_the_remainder_to_the_other_module():
    splits = [(8, 124), (56, 76), (64, 68), (72, 60)]

    # Swapped they are (124, 8), (76, 56), (68, 64) and (60, 72).
    assert nearest_swapped(splits, (64, 68)) == [(60, 72), (68, 64)]


def test_best_of_a_scan_is_the_fastest_that_ran():
    scan = [
        {
            **Arm(name="split", mode="green", sms={"a": sms}).written(),
            "kind": "split",
            "median_s": s,
        }
        for sms, s in ((8, 3.0), (16, 2.0), (24, None))
    ]

    best = best_of(scan, "split")

    assert best is not None
    assert best.sms == {"a": 16}
    assert best_of(scan, "cap") is None


def test_arms_that_say_most_are_kept_where_memory_is_short():
    arms = [Arm(name="A"), Arm(name="A again"), Arm(name="B", mode="streams"),
            Arm(name="D", mode="green"), Arm(name="A'", graphs=True),
            Arm(name="F", mode="green", graphs=True)]  # fmt: skip

    # A and its control share 10; then 10 each for A', F and D. Nothing is left for B.
    assert affordable(arms, each_bytes=10, free_bytes=45) == {"A", "A again", "A'", "F", "D"}


def test_blocks_are_those_of_kernels():
    events = [
        {"cat": "kernel", "name": "gemm", "args": {"grid": [66, 2, 1]}},
        {"cat": "cpu_op", "name": "aten::mm", "args": {}},
    ]

    assert blocks_of(events) == {"gemm": 132}


def test_row_of_a_later_call_takes_the_place_of_the_earlier_one():
    first, second = {"name": "one"}, {"name": "two"}
    results = {"parts": {}}
    put_row(results, "p4", {"case": "a", "value": 1}, machine=first)
    put_row(results, "p4", {"case": "b", "value": 2}, machine=first)
    later = put_row({"parts": {}}, "p4", {"case": "a", "value": 3}, machine=second)
    put_row(later, "p4", {"case": "b", "skipped": "time"}, machine=second)

    merge(results, later)

    assert rows_of(results, "p4") == [
        {"case": "a", "value": 3, "machine": 1},
        {"case": "b", "value": 2, "machine": 0},
    ]
    assert results["parts"]["p4"]["machines"] == [first, second]


def _arm(median_s: float, gain: float, *, width: float = 0.0) -> dict:
    interval = {"estimate": gain, "low": gain - width, "high": gain + width}
    return {"median_s": median_s, "gain": interval}


def _case(arms: dict, *, modules: int = 2, best: str = "F") -> dict:
    return {
        "case": "case",
        "on_host": False,
        "modules": ["m"] * modules,
        "noise": 0.01,
        "best": best,
        "arms": arms,
        "gradients_agree": True,
        "largest_gradient_error": 1e-3,
    }


@pytest.mark.parametrize(("chosen_s", "holds"), [(1.029, True), (1.031, False)])
def test_planners_choice_may_be_three_percent_off_the_best_arm(chosen_s, holds):
    steps = [_case({"F": _arm(1.0, 1.2), "G'": _arm(chosen_s, 1.1)})]

    assert near_best(steps).holds is holds


@pytest.mark.parametrize(("gain", "holds"), [(0.985, True), (0.97, False)])
def test_planners_choice_is_slower_than_serial_only_beyond_noise(gain, holds):
    # Its interval ends 0.01 above the estimate; noise is 0.01.
    steps = [_case({"G'": _arm(1.0, gain, width=0.01)})]

    assert never_slower(steps).holds is holds


def test_goals_are_of_pairs_and_of_sets():
    pair = _case({"A": _arm(1.0, 1.3), "F": _arm(1.0, 1.16)})
    towers = _case({"F": _arm(1.0, 1.2)}, modules=5)

    assert goal([pair, towers], least=2, most=2, gain=1.15).holds is True
    assert goal([pair, towers], least=4, most=None, gain=1.25).holds is False
    assert goal([pair], least=4, most=None, gain=1.25).holds is None


def test_gap_counts_with_the_best_lanes_that_filled_it():
    row = {"case": "case", "gap_of_encoder": 0.5}
    rows = [row | {"arm": arm, "recovered": share}
            for arm, share in (("serial", 1.0), ("streams", 0.7), ("cap", 0.81))]  # fmt: skip

    assert gaps_filled(rows).holds is True
    assert gaps_filled(rows[:2]).holds is False


def test_lanes_are_disjoint_only_if_every_split_was_right():
    right = {"asked": {"a": 8, "b": 24}, "counts": {"a": 8, "b": 24}, "disjoint": True}
    shared = right | {"disjoint": False}

    assert disjoint([{"probe": "lanes", "splits": [right]}]).holds is True
    assert disjoint([{"probe": "lanes", "splits": [right, shared]}]).holds is False
    assert disjoint([{"probe": "lanes", "splits": [right, {"failed": "driver"}]}]).holds is False


def test_gradients_that_differ_are_told():
    wrong = _case({}) | {"gradients_agree": False}

    assert gradients([_case({}), wrong]).holds is False


def test_nothing_is_shown_or_refuted_before_it_is_measured():
    assert {verdict.holds for verdict in verdicts({"parts": {}})} == {None}


def test_step_without_one_of_its_events_is_a_race():
    setting = setting_on("cpu", budget_s=1)
    case = cases_for(setting)[0]
    bench = Bench(case, setting, LaneBank(setting))
    lanes = LaneBank(setting).lanes("green", {"language": 16, "vision": 16})
    run = StepRun(bench.modules, bench.batch, plan_of(case, sms={}), lanes)
    run()

    first = next(n for n, step in enumerate(run.steps) if step.after)
    run.steps = tuple(
        step._replace(after=()) if n == first else step for n, step in enumerate(run.steps)
    )

    with pytest.raises(AssertionError, match="without waiting for lane vision"):
        run()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_planner_can_read_a_case(case):
    model = model_from_document(document_of(case))

    assert set(model.modules) == set(case.modules)


def test_caps_leave_the_language_model_free():
    case = cases_for(setting_on("cpu", budget_s=1))[1]

    assert cap_quotas(case, 8) == {"audio": 8, "depth": 8, "language": None, "vision": 8}


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory):
    path = tmp_path_factory.mktemp("sharing") / "results.json"
    main(["run", "--part", "all", "--dry-run", "--output", str(path)])
    return path


def test_dry_run_has_rows_of_every_part(dry_run):
    parts = json.loads(dry_run.read_text())["parts"]

    assert sorted(parts) == ["p0", "p1", "p2", "p3", "p4", "p5"]
    assert all(part["rows"] and part["machines"] for part in parts.values())


def test_dry_run_runs_every_arm_with_equal_gradients(dry_run):
    rows = rows_of(json.loads(dry_run.read_text()), "p4")

    assert [len(row["modules"]) for row in rows] == [2, 4]
    for row in rows:
        ran = {name for name, arm in row["arms"].items() if not arm["failed"]}
        assert ran == {"A", "A again", "A batch", "B", "C", "D", "E", "G"}
        captured = {arm["failed"] for name, arm in row["arms"].items() if name not in ran}
        assert captured == {"HostError: device=cpu must be a GPU to capture a step"}
        lanes = [row["arms"][name]["gradient_errors"] for name in ("B", "C")]
        assert all(set(errors.values()) == {0.0} for errors in lanes)
        assert row["gradients_agree"]


def test_dry_run_invents_no_number_of_a_gpu(dry_run):
    results = json.loads(dry_run.read_text())

    needing = [row for row in rows_of(results, "p0") if row.get("needs") == "a GPU"]
    assert {row["probe"] for row in needing} >= {"resource", "split by count", "connections"}
    assert {row["co_run_s"] for row in rows_of(results, "p2")} == {None}
    assert {row["recovered"] for row in rows_of(results, "p5")} == {None}
    told = {verdict.line: verdict.holds for verdict in verdicts(results)}
    assert told.pop("gradients agree in every arm") is True
    assert set(told.values()) == {None}


def test_calls_are_merged_into_one_file(dry_run, tmp_path):
    whole, again = tmp_path / "whole.json", tmp_path / "again.json"
    main(["run", "--part", "p0", "--dry-run", "--output", str(again)])

    main(["merge", str(whole), str(dry_run), str(again)])

    parts = json.loads(whole.read_text())["parts"]
    assert len(parts["p0"]["rows"]) == 7
    assert len(parts) == 6


def test_only_the_cases_that_are_named_run(tmp_path, capsys):
    path = tmp_path / "one.json"

    main(["run", "--part", "p4", "--dry-run", "--cases", "pair", "--output", str(path)])

    assert [row["case"] for row in rows_of(json.loads(path.read_text()), "p4")] == ["tiny pair"]
    assert "tiny pair" in capsys.readouterr().out


def test_a_part_without_time_says_what_it_left_out(tmp_path):
    path = tmp_path / "none.json"

    main(["run", "--part", "p1", "--dry-run", "--budget-s", "0", "--output", str(path)])

    rows = rows_of(json.loads(path.read_text()), "p1")
    assert {row["skipped"] for row in rows} == {"too little was left of 0 s"}


def test_summary_prints_tables_and_draws(dry_run, capsys):
    main(["summary", str(dry_run)])

    printed = capsys.readouterr().out
    assert "What was to be shown" in printed
    assert "tiny towers" in printed
    assert dry_run.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_spin_kernel_reads_the_sm_and_the_clock():
    triton = pytest.importorskip("triton", reason="Triton comes with torch for a GPU only")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from benchmarks.sharing import kernels

    types = {"ids": "*i32", "duration_ns": "i32"}
    source = ASTSource(fn=kernels._spin_kernel, signature=types, constexprs={})
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 1})

    assert "%smid" in made.asm["ptx"]
    assert made.asm["ptx"].count("%globaltimer") == 2
