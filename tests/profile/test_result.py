from dataclasses import replace

import pytest

from megatron_mosaic.cluster.cluster_file import parse_cluster, write_cluster
from megatron_mosaic.cluster.shipped import load_cluster
from megatron_mosaic.errors import LayoutError, PlanError
from megatron_mosaic.profile.measurements import (
    Device,
    Measurements,
    TimedMessage,
    TimedOperation,
    TimedPasses,
)
from megatron_mosaic.profile.result import Fitted, measured_cluster, table_rows

DEVICE = Device(
    kind="cuda",
    name="NVIDIA H100 80GB HBM3",
    memory_bytes=85e9,
    num_sms=132,
    software={"torch": "2.13.0", "driver": "580.65.06"},
)


def _rate(curve, limit_per_s, half_size=0.0):
    sizes = (1e9, 1e10, 1e11)
    return tuple(TimedOperation(curve, it, (it + half_size) / limit_per_s) for it in sizes)


def _link(reach, latency_s, bandwidth_bytes_per_s):
    return tuple(
        TimedMessage(reach, "send", 1, it, latency_s + it / bandwidth_bytes_per_s)
        for it in (1e3, 1e6, 1e9)
    )


MEASURED = Measurements(
    device=DEVICE,
    operations=(
        *_rate("matmul.bf16", 692.58e12, 4e9),  # 70 % of 989.4
        *_rate("attention.forward", 494.7e12),  # half
        *_rate("elementwise", 2.68e12),  # 80 % of 3.35
    ),
    messages=(*_link("near", 6e-6, 360e9), *_link("far", 2e-5, 40e9)),
    ranks_per_node=8,
    num_nodes=2,
    quick=False,
    layer=TimedPasses(1e-3, 3e-3),
)


def _fitted(**changes):
    return Fitted.of(replace(MEASURED, **changes), date="2026-01-31")


def test_measured_operation_overrides_the_curve_of_the_base():
    gpu = measured_cluster(_fitted(), load_cluster("h100")).gpu

    assert gpu.curves["matmul.bf16"].peak_share == pytest.approx(0.7, rel=1e-3)
    assert gpu.curves["matmul.bf16"].half_size == pytest.approx(4e9, rel=1e-3)
    assert gpu.curves["elementwise"].peak_share == pytest.approx(0.8, rel=1e-3)
    assert gpu.matmul_flops_per_s == load_cluster("h100").gpu.matmul_flops_per_s


def test_operation_that_was_not_measured_stays_that_of_the_base():
    base = load_cluster("h100").gpu

    gpu = measured_cluster(_fitted(), load_cluster("h100")).gpu

    assert gpu.curves["matmul.fp8"] == base.curves["matmul.fp8"]
    assert gpu.curves["attention.backward"] == base.curves["attention.backward"]


def test_measured_links_override_those_of_the_base():
    near, far = measured_cluster(_fitted(), load_cluster("h100")).tiers

    # 360 of 450 GB/s, and 40 of 50.
    assert (near.name, near.span) == ("NVLink 4", 8)
    assert near.curve.peak_share == pytest.approx(0.8, rel=1e-3)
    assert near.latency_s == pytest.approx(6e-6, rel=1e-3)
    assert near.bandwidth_bytes_per_s == 450e9
    assert far.curve.peak_share == pytest.approx(0.8, rel=1e-3)


def test_links_between_nodes_stay_those_of_the_base_after_a_run_on_one_node():
    fitted = _fitted(messages=_link("near", 6e-6, 360e9), num_nodes=1)

    cluster = measured_cluster(fitted, load_cluster("h100"))

    assert cluster.tiers[1] == load_cluster("h100").tiers[1]
    assert cluster.num_nodes == load_cluster("h100").num_nodes


def test_every_measured_number_names_device_torch_and_driver():
    cluster = measured_cluster(_fitted(), load_cluster("h100"))

    source = "megatron-mosaic profile, 2026-01-31: NVIDIA H100 80GB HBM3, torch 2.13.0, driver"
    assert cluster.gpu.curves["matmul.bf16"].source.startswith(source)
    assert cluster.tiers[0].curve.source.startswith(source)
    assert source in cluster.tiers[0].source


def test_rate_beyond_the_data_sheet_of_the_base_is_refused():
    with pytest.raises(
        LayoutError,
        match=r"gpu A100-80G: matmul_flops_per_s.bf16=3.12e\+14 must be >= the measured "
        r"attention.forward=4.947e\+14; name the cluster of this device with --base",
    ):
        measured_cluster(_fitted(), load_cluster("a100-80g"))


def test_cluster_without_a_base_has_the_capability_of_its_gpu():
    # By which the planner knows which quotas it can have.
    device = replace(DEVICE, compute_capability=(9, 0))

    assert measured_cluster(_fitted(device=device), None).gpu.compute_capability == (9, 0)
    assert measured_cluster(_fitted(), None).gpu.compute_capability is None  # a CPU


def test_cluster_without_a_base_has_the_measured_limits_as_peaks():
    cluster = measured_cluster(_fitted(), None)

    assert cluster.gpu.matmul_flops_per_s == {"bf16": pytest.approx(692.58e12, rel=1e-3)}
    assert cluster.gpu.curves["attention.forward"].peak_share == pytest.approx(
        494.7 / 692.58, rel=1e-3
    )
    assert cluster.gpu.memory_bytes_per_s == pytest.approx(2.68e12, rel=1e-3)
    assert (cluster.gpus_per_node, cluster.num_nodes) == (8, 2)
    assert [(tier.name, tier.span) for tier in cluster.tiers] == [
        ("NCCL in a node", 8),
        ("NCCL between nodes", None),
    ]
    assert cluster.tiers[0].bandwidth_bytes_per_s == pytest.approx(360e9, rel=1e-3)


def test_cluster_without_a_base_takes_latent_attention_for_attention():
    curves = measured_cluster(_fitted(), None).gpu.curves

    assert curves["latent_attention.forward"].peak_share == curves["attention.forward"].peak_share
    assert curves["latent_attention.forward"].source.startswith("stands in: attention.forward, ")


@pytest.mark.parametrize("base", ["h100", None])
def test_written_cluster_is_read_back(base):
    cluster = measured_cluster(_fitted(), base and load_cluster(base))

    assert parse_cluster(write_cluster(cluster), where="measured") == cluster


def test_one_rank_without_a_base_is_refused():
    with pytest.raises(PlanError, match=r"ranks=1 must be > 1 without --base"):
        measured_cluster(_fitted(messages=(), ranks_per_node=1, num_nodes=1), None)


def test_table_has_a_row_for_every_curve_and_collective():
    rows = list(table_rows(_fitted()))

    assert [row[0] for row in rows] == [
        "attention.forward",
        "elementwise",
        "matmul.bf16",
        "send, near",
        "send, far",
    ]
    # 1e11 FLOPs in (1e11 + 4e9) / 692.58e12 s are 666 TFLOP/s.
    assert rows[2][1:] == ("3", "666 TFLOP/s", "693 TFLOP/s", "half at 4e+09", "0.0%")
    # 1 GB in 20 us + 25 ms.
    assert rows[4][1:] == ("3", "40 GB/s", "40 GB/s", "latency 20 us", "0.0%")
