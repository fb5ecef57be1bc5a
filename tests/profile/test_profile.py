import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_mosaic.cli import main
from megatron_mosaic.cluster.cluster_file import read_cluster
from megatron_mosaic.cost.cost_model import CostModel
from megatron_mosaic.layout.plan import Plan
from megatron_mosaic.model.shipped import load_model

ROOT = Path(__file__).parents[2]

PLAN = """\
format: 1
world_size: 2
global_batch_size: 4
micro_batch_size: 1
modules:
  language: {ranks: 0-1, tensor_model_parallel_size: 2}
edges: []
schedule: {kind: 1f1b}
"""


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    path = tmp_path_factory.mktemp("profile") / "cpu.yaml"
    assert main(["profile", str(path), "--quick", "--device", "cpu", "--nproc", "2"]) == 0
    return path


def test_profile_of_a_cpu_is_a_cluster_of_its_ranks(measured):
    cluster = read_cluster(measured)

    assert (cluster.gpus_per_node, cluster.num_nodes) == (2, 1)
    assert [tier.name for tier in cluster.tiers] == ["gloo in a node"]
    assert cluster.tiers[0].latency_s > 0
    assert set(cluster.gpu.matmul_flops_per_s) == {"fp32", "bf16"}
    for curve in cluster.gpu.curves.values():
        assert re.search(
            r"megatron-mosaic profile, \d{4}-\d\d-\d\d: .*, torch \d.*error", curve.source
        )


def test_profile_drives_a_cost_estimate(measured):
    cluster, plan = read_cluster(measured), Plan.loads(PLAN, "plan")

    estimate = CostModel(load_model("llama-3-8b"), cluster).estimate(plan)

    # The fastest that the measured limit allows: all FLOPs on two ranks.
    limit_flops_per_s = cluster.gpu.matmul_flops_per_s["bf16"]
    assert estimate.step_s > estimate.flops / 2 / limit_flops_per_s


def test_measured_optimizer_step_is_what_the_estimate_takes(measured):
    cluster, plan = read_cluster(measured), Plan.loads(PLAN, "plan")
    curve = cluster.gpu.curves["optimizer"]
    slower = replace(curve, peak_share=curve.peak_share / 2)
    slower_gpu = replace(cluster.gpu, curves={**cluster.gpu.curves, "optimizer": slower})

    times_s = [
        CostModel(load_model("llama-3-8b"), each).estimate(plan).breakdown.optimizer_s
        for each in (cluster, replace(cluster, gpu=slower_gpu))
    ]

    assert times_s[1] == pytest.approx(2 * times_s[0])


def test_profile_of_one_rank_keeps_the_links_of_the_base(tmp_path, capsys, monkeypatch):
    # One thread: two would wait for each other where others use the machine.
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0})
    path = tmp_path / "again.yaml"

    status = main(
        ["profile", str(path), "--quick", "--device", "cpu", "--nproc", "1", "--base", "h100"]
    )

    assert status == 0
    assert re.search(
        r"a whole layer in bf16: forward measured .* ms, estimated .* ms \(\d+%\); both passes",
        capsys.readouterr().out,
    )
    cluster = read_cluster(path)
    assert [tier.name for tier in cluster.tiers] == ["NVLink 4", "InfiniBand NDR"]
    # A hundred times slower than the base's data sheet, at least.
    assert cluster.gpu.curves["matmul.bf16"].peak_share < 0.01


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["cpu.yaml", "--nproc", "0"], "nproc=0 must be >= 1; give the number of ranks"),
        (["cpu.yaml", "--nproc", "1"], "nproc=1 must be > 1 without --base"),
        (["cpu.json"], "output=cpu.json must end with .yaml; rename it"),
        (["nowhere/cpu.yaml"], "output=nowhere/cpu.yaml must lie in a folder that exists"),
        (["cpu.yaml", "--base", "h1000"], "cluster='h1000' must be a file or one of"),
        (["cpu.yaml", "--device", "cuda", "--nproc", "99"], "must be one of the"),
        (["cpu.yaml", "--device", "tpu"], "invalid choice: 'tpu'"),
    ],
)
def test_wrong_input_is_one_line(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        status = main(["profile", *arguments])
    except SystemExit as stopped:
        status = stopped.code

    captured = capsys.readouterr()
    assert status == 2
    assert message in captured.err
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    assert not list(tmp_path.iterdir())


def test_number_of_ranks_is_refused_under_a_launcher(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "0")

    assert main(["profile", "cpu.yaml", "--nproc", "2"]) == 2

    assert "nproc=2 must not be given under torchrun" in capsys.readouterr().err


def test_ranks_of_a_launcher_measure_together(tmp_path):
    from tests.ranks import run_ranks

    path = tmp_path / "launched.yaml"

    assert run_ranks(_profile_as_rank, 2, str(path), init=False) == [0, 0]

    assert read_cluster(path).gpus_per_node == 2


def _profile_as_rank(rank, path):
    return main(["profile", path, "--quick", "--device", "cpu"])


def test_error_of_the_first_launched_rank_is_said_once(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["-m", "megatron_mosaic.cli", "profile", str(tmp_path / "no" / "cpu.yaml")]

    process = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )

    assert process.returncode != 0
    assert process.stderr.count("must lie in a folder that exists") == 1
