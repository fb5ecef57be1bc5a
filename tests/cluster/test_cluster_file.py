from dataclasses import fields

import pytest

from megatron_mosaic.cluster.cluster_file import (
    load_gpu,
    parse_cluster,
    shipped_gpus,
    write_cluster,
)
from megatron_mosaic.cluster.shipped import load_cluster, resized, shipped_clusters
from megatron_mosaic.errors import LayoutError

OWN = """
format: 1
name: two-boxes
gpu:
  name: Own
  memory_bytes: 1e9
  matmul_flops_per_s: {bf16: 1e12}
  memory_bytes_per_s: 5e10
  num_sms: 8
  curves: {matmul.bf16: {peak_share: 0.5, half_size: 1e6, source: measured}}
  sources: measured
gpus_per_node: 4
num_nodes: 2
tiers:
  - {name: near, span: 4, bandwidth_bytes_per_s: 1e10, latency_s: 1e-6,
     curve: {peak_share: 0.9, source: measured}, source: measured}
  - {name: far, bandwidth_bytes_per_s: 1e9, latency_s: 1e-5,
     curve: {peak_share: 0.8, half_size: 1e6, source: measured}, source: measured}
"""


def test_issue_names_are_shipped():
    assert {"a100-80g", "h100", "h200", "b200", "gb200-nvl72"} <= set(shipped_clusters())
    assert {"a100-80g", "h100", "h200", "b200", "gb200", "b300", "gb300"} <= set(shipped_gpus())


@pytest.mark.parametrize("name", shipped_clusters())
def test_shipped_cluster_survives_being_written(name):
    cluster = load_cluster(name)

    assert parse_cluster(write_cluster(cluster), where="again") == cluster


@pytest.mark.parametrize("name", shipped_clusters())
def test_every_number_of_a_shipped_cluster_has_a_source(name):
    cluster = load_cluster(name)
    numbers = {it.name for it in fields(cluster.gpu)} - {"name", "curves", "sharing", "sources"}

    assert {it for it in numbers if getattr(cluster.gpu, it)} <= set(cluster.gpu.sources)
    assert all(cluster.gpu.sources.values())
    assert cluster.gpu.sharing is not None
    assert cluster.gpu.sharing.source
    assert all(curve.source for curve in cluster.gpu.curves.values())
    assert all(tier.source and tier.curve.source for tier in cluster.tiers)


def test_own_gpu_is_read_with_its_numbers():
    cluster = parse_cluster(OWN, where="own")

    assert cluster.num_gpus == 8
    assert cluster.gpu.peak_flops_per_s("fp8") == 1e12
    # 0.5 * 1e6 / (1e6 + 1e6)
    assert cluster.gpu.curves["matmul.bf16"].share(1e6) == 0.25
    assert [cluster.tier(span).name for span in (1, 4, 8)] == ["near", "near", "far"]


def test_peaks_are_dense():
    # Data sheets: A100 312, H100 989 and B200 2,250 TFLOPS of bf16 without sparsity.
    peaks = [load_gpu(name).matmul_flops_per_s["bf16"] for name in ("a100-80g", "h100", "b200")]
    assert peaks == [312e12, 989.4e12, 2250e12]


def test_number_of_gpus_fills_nodes():
    assert load_cluster("h100", num_gpus=512).num_nodes == 64
    assert load_cluster("h100", num_gpus=4).gpus_per_node == 4
    assert load_cluster("gb200-nvl72", num_gpus=16).num_nodes == 4


def test_links_of_a_rack_reach_72_gpus():
    cluster = load_cluster("gb200-nvl72", num_gpus=144)

    assert cluster.tier(72).name == "NVLink 5"
    assert cluster.tier(144).name == "InfiniBand NDR"


def test_number_of_gpus_that_leaves_a_node_half_empty_is_refused():
    with pytest.raises(LayoutError, match=r"num_gpus=17 must be a multiple of .*=8.*; use 16"):
        load_cluster("h100", num_gpus=17)


def test_number_of_gpus_beyond_the_links_is_refused():
    text = OWN.replace("name: far,", "name: far, span: 8,")
    cluster = parse_cluster(text, where="own")
    assert cluster.num_gpus == 8

    with pytest.raises(LayoutError, match="num_gpus=16 must be <= span=8 of far"):
        resized(cluster, num_gpus=16)


@pytest.mark.parametrize(
    ("size_bytes", "measured_us"),
    [(2**21, 113.2), (2**22, 154.4), (2**23, 231.4), (2**24, 420.5), (2**25, 812.3)],
)
def test_network_of_the_h100_gives_measured_times(size_bytes, measured_us):
    tier = load_cluster("h100").tiers[-1]

    # Two ranks: two steps, in all of which each sends the size once.
    share = tier.curve.share(size_bytes)
    time_s = 2 * tier.latency_s + size_bytes / (tier.bandwidth_bytes_per_s * share)

    # https://github.com/NVIDIA/nccl-tests/issues/232: all_reduce_perf on two nodes, out of place.
    assert time_s * 1e6 == pytest.approx(measured_us, rel=0.11)
