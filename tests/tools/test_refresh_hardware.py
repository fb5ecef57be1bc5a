from dataclasses import replace

import pytest
import yaml

from megatron_mosaic.cluster.cluster_file import (
    _read_gpu,
    load_gpu,
    parse_cluster,
    read_cluster,
    shipped_gpus,
    write_cluster,
)
from megatron_mosaic.cluster.shipped import load_cluster
from megatron_mosaic.cluster.spec import Curve
from megatron_mosaic.errors import PlanError
from tools import refresh_hardware
from tools.refresh_hardware import cluster_text, gpu_text, main, refreshed_gpu

SOURCE = "megatron-mosaic profile, 2026-12-01: NVIDIA H200, torch 2.13; mean error 2.0%"


def _measured():
    """An H200 cluster on which one curve and the links of a node were measured."""
    cluster = load_cluster("h200")
    curves = {**cluster.gpu.curves, "matmul.bf16": Curve(peak_share=0.71, source=SOURCE)}
    near = replace(
        cluster.tiers[0], latency_s=5e-6, curve=Curve(peak_share=0.9, source=SOURCE), source=SOURCE
    )
    return replace(
        cluster,
        gpu=replace(cluster.gpu, curves=curves),
        tiers=(near, *cluster.tiers[1:]),
    )


@pytest.mark.parametrize("name", shipped_gpus())
def test_gpu_file_that_is_written_anew_says_the_same(name):
    gpu = load_gpu(name)
    document = yaml.safe_load(gpu_text(gpu))

    assert document.pop("format") == 1
    assert _read_gpu("gpu", document) == gpu


def test_cluster_file_that_is_written_anew_says_the_same():
    cluster = load_cluster("h200")

    assert parse_cluster(cluster_text(cluster, gpu="h200"), where="h200") == cluster


def test_measured_numbers_replace_the_files_and_all_others_keep_their_sources():
    before, after = load_gpu("h200"), refreshed_gpu(load_gpu("h200"), _measured().gpu)

    assert after.curves["matmul.bf16"] == Curve(peak_share=0.71, source=SOURCE)
    assert {**after.curves, "matmul.bf16": 0} == {**before.curves, "matmul.bf16": 0}
    assert after.sharing == before.sharing  # assumed, and nobody measured it
    assert after.sources == before.sources


def test_measurement_of_another_gpu_is_refused():
    with pytest.raises(PlanError, match="name=H200 must be H100, as of H100; profile with --base"):
        refreshed_gpu(load_gpu("h100"), _measured().gpu)


def test_command_says_what_changes_and_writes_it_on_request(tmp_path, monkeypatch, capsys):
    for folder, text in (
        ("gpus", gpu_text(load_gpu("h200"))),
        ("clusters", cluster_text(load_cluster("h200"), gpu="h200")),
    ):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "h200.yaml").write_text(text)
    monkeypatch.setattr(refresh_hardware, "FOLDER", tmp_path)
    path = tmp_path / "measured.yaml"
    path.write_text(write_cluster(_measured()))
    command = [str(path), "--gpu", "h200", "--cluster", "h200"]

    assert main(command) == 0
    said = capsys.readouterr().out
    assert "h200.curves.matmul.bf16.peak_share: 0.646 -> 0.71\n" in said
    assert "h200.tiers[0].latency_s: 3.4e-06 -> 5e-06\n" in said
    assert read_cluster(tmp_path / "clusters/h200.yaml") == load_cluster("h200")

    assert main([*command, "--write"]) == 0
    document = yaml.safe_load((tmp_path / "gpus/h200.yaml").read_text())
    assert document["curves"]["matmul.bf16"]["peak_share"] == 0.71
    assert read_cluster(tmp_path / "clusters/h200.yaml").tiers == _measured().tiers


def test_command_refuses_a_file_that_is_none(tmp_path, capsys):
    assert main([str(tmp_path / "no.yaml"), "--gpu", "h200"]) == 2
    assert "no.yaml" in capsys.readouterr().err
