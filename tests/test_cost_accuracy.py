"""The published points, how they are read, and the committed errors."""

import json

import pytest

from benchmarks.accuracy_summary import numbers
from benchmarks.cost_accuracy import main
from benchmarks.halves import fitted_cases, halves
from benchmarks.machine import RESULTS
from benchmarks.predictions import predict
from benchmarks.published_points import POINTS, cases_of, newest, read_points
from benchmarks.published_settings import release_of
from benchmarks.summary import README

HEADER = POINTS.read_text().splitlines()[0]
DENSE = "LLAMA3_70B (Pre-Training),70B,GB200,64,1,1,1,,64,,8192,2,256,FP8,{metric},{value},{source}"


def written(tmp_path, *rows):
    path = tmp_path / "points.csv"
    path.write_text("\n".join([HEADER, *rows]) + "\n")
    return path


def dense(metric="tokens_per_sec_per_gpu", value="4224", release="26.04"):
    source = f"Megatron-Bridge docs/performance-summary.md rel {release}; FSDP=64"
    return DENSE.format(metric=metric, value=value, source=source)


def test_rate_becomes_seconds_of_a_step(tmp_path):
    (case,), _ = cases_of(read_points(written(tmp_path, dense())))

    # 256 * 8192 tokens / 64 GPUs / 4224 tokens/s.
    assert case.step_s == pytest.approx(7.7576, rel=1e-4)
    assert case.settings.fsdp


def test_tflops_become_seconds_of_a_step(tmp_path):
    (case,), _ = cases_of(
        read_points(written(tmp_path, dense(metric="model_tflops_per_gpu", value="1892")))
    )

    # 449.2 GFLOP by token * 256 * 8192 tokens / 64 GPUs / 1892 TFLOPS.
    assert case.step_s == pytest.approx(7.78, rel=0.005)


def test_newest_release_of_a_layout_stands(tmp_path):
    rows = (dense(value="4000", release="26.02.01"), dense(value="4224", release="26.04"))
    cases, _ = cases_of(read_points(written(tmp_path, *rows)))

    assert [case.value for case in newest(cases)] == [4224]


def test_releases_compare_as_numbers():
    assert release_of("x rel 26.02.01; y") == (26, 2, 1)
    assert release_of("x rel 25.11") < release_of("x rel 26.02")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (dense().replace("LLAMA3_70B", "UNKNOWN_9B"), "the geometry of this model is not known"),
        (dense().replace(",FP8,", ",,"), "precision is not stated"),
        (dense().replace(",64,1,1,1,", ",64,3,1,1,"), "num_gpus=64 is not a multiple of tp"),
        (dense(metric="mfu_pct"), "mfu_pct is a ratio"),
        (dense(value="fast"), "value='fast' is not a number"),
        (dense().replace(",8192,2,", ",,2,"), "seq_len is not stated"),
    ],
)
def test_row_that_cannot_be_estimated_says_why(tmp_path, row, reason):
    cases, (skipped,) = cases_of(read_points(written(tmp_path, row)))

    assert not cases
    assert reason in skipped.reason


def test_file_without_a_column_is_one_line(tmp_path, capsys):
    path = tmp_path / "points.csv"
    path.write_text("model,gpu,metric,value\nx,y,z,1\n")

    assert main(["--points", str(path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "points.csv: columns=model,gpu,metric,value must have params, num_gpus" in error


def test_missing_file_is_one_line(tmp_path, capsys):
    assert main(["--points", str(tmp_path / "no.csv")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_other_points_are_estimated_and_nothing_is_written(tmp_path, capsys):
    before = (RESULTS / "cost_accuracy.json").stat().st_mtime_ns

    assert main(["--points", str(written(tmp_path, dense())), "--rows"]) == 0
    assert "bridge-dense" in capsys.readouterr().out
    assert (RESULTS / "cost_accuracy.json").stat().st_mtime_ns == before


def test_halves_share_no_layout():
    first, second = halves(fitted_cases(read_points()))

    assert not {case.layout for case in first} & {case.layout for case in second}
    assert abs(len(first) - len(second)) < 20


def test_published_step_is_met():
    cases, _ = cases_of(read_points())
    name = "llama3_70b_tp2_pp1_dp4_l12_mbc32_cef"  # of SimuMax, half B: 5.3765 s on 8 B200
    case = next(it for it in cases if it.step_s and name in it.point.fields["source"])

    assert predict(case).step_s == pytest.approx(5.3765, rel=0.05)


def test_committed_errors_are_within_the_targets():
    results = json.loads((RESULTS / "cost_accuracy.json").read_text())
    sources = results["sources"]

    # Both halves: the one that constants were fitted to, and the one that they never saw.
    assert max(sources["simumax"][half]["mape"] for half in "AB") <= 0.05
    assert max(sources["a100-2205.05198"][half]["mape"] for half in "AB") <= 0.035
    assert max(sources["bridge-dense"][half]["mape"] for half in "AB") <= 0.12
    assert max(sources["bridge-moe"][half]["mape"] for half in "AB") <= 0.20
    assert sources["vlm"]["all"]["mape"] <= 0.20
    assert sources["bridge-dense"]["all"]["rank"] >= 0.849
    assert results["lora_flop_ratio"] == pytest.approx(0.645, rel=0.03)


def test_committed_gains_of_an_encoder_apart_have_the_right_sign():
    results = json.loads((RESULTS / "cost_accuracy.json").read_text())

    assert len(results["17_gpus"]) == 6
    for cell in results["17_gpus"]:
        gains = [v for k, v in cell.items() if k not in ("dataset", "sequence_length")]
        assert min(gains) > 0


def test_readme_has_the_committed_errors():
    assert numbers() in README.read_text()
