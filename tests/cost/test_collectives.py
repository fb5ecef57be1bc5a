import pytest

from megatron_mosaic.cluster.spec import Cluster, Curve, Gpu, LinkTier
from megatron_mosaic.cost.collectives import (
    Group,
    all_gather_s,
    all_reduce_s,
    all_to_all_s,
    send_s,
)

NEAR = LinkTier(
    name="near", span=8, bandwidth_bytes_per_s=400e9, latency_s=5e-6, curve=Curve(peak_share=1.0)
)
FAR = LinkTier(
    name="far", span=None, bandwidth_bytes_per_s=50e9, latency_s=20e-6, curve=Curve(peak_share=1.0)
)
GPU = Gpu(
    name="g", memory_bytes=1, matmul_flops_per_s={"bf16": 1}, memory_bytes_per_s=1, num_sms=1,
    curves={},
)  # fmt: skip
CLUSTER = Cluster(name="c", gpu=GPU, gpus_per_node=8, num_nodes=4, tiers=(NEAR, FAR))


def group(size, stride=1):
    return Group.of(CLUSTER, size=size, stride=stride)


def test_group_inside_a_node_uses_near_links():
    assert group(8) == Group(size=8, near_size=8, near=NEAR, far=NEAR)


def test_group_over_nodes_knows_its_members_of_a_node():
    assert group(16) == Group(size=16, near_size=8, near=NEAR, far=FAR)


def test_group_with_the_stride_of_a_node_has_far_links_alone():
    assert group(4, stride=8) == Group(size=4, near_size=4, near=FAR, far=FAR)


def test_all_gather_inside_a_node():
    # 7/8 GB over 400 GB/s, and 7 steps of 5 us.
    assert all_gather_s(group(8), total_bytes=1e9) == pytest.approx(2.2225e-3)


def test_all_gather_over_nodes_is_bound_by_the_interfaces_of_a_node():
    # 15/16 GB over 8 * 50 GB/s, a step of 20 us between two nodes, and 7 of 5 us inside.
    assert all_gather_s(group(16), total_bytes=1e9) == pytest.approx(2.39875e-3)


def test_all_gather_of_far_ranks_has_one_interface():
    # 3/4 GB over 50 GB/s, and 3 steps of 20 us.
    assert all_gather_s(group(4, stride=8), total_bytes=1e9) == pytest.approx(15.06e-3)


def test_all_reduce_is_two_all_gathers():
    assert all_reduce_s(group(8), total_bytes=1e9) == pytest.approx(4.445e-3)


@pytest.mark.parametrize("collective", [all_gather_s, all_reduce_s])
def test_collective_of_one_rank_is_free(collective):
    assert collective(group(1), total_bytes=1e9) == 0.0


def test_all_to_all_waits_for_what_leaves_the_node():
    # Of 16 parts of 1/16 GB, 8 go far over 50 GB/s: 10 ms, and 20 us.
    assert all_to_all_s(group(16), sent_bytes=1e9) == pytest.approx(10.02e-3)


def test_all_to_all_of_one_rank_is_free():
    assert all_to_all_s(group(1), sent_bytes=1e9) == 0.0


def test_message_has_latency_and_bandwidth():
    # 1 GB over 50 GB/s, and 20 us.
    assert send_s(FAR, message_bytes=1e9) == pytest.approx(20.02e-3)
