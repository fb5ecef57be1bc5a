"""What a part of a GPU does, and several modules on one, beside worked values."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_mosaic.cluster.cluster_file import load_gpu
from megatron_mosaic.cluster.spec import Curve, SharingCurves
from megatron_mosaic.cost.efficiency import forward_s, memory_s
from megatron_mosaic.cost.spatial import (
    Demand,
    gpu_with,
    rate_share,
    slowdowns,
    sms_beside,
)
from megatron_mosaic.errors import PlanError
from tests.cost.stair import static_grid_rate
from tests.cost.test_efficiency import GPU as WHOLE
from tests.cost.test_efficiency import MATMUL

SHARING = SharingCurves(bandwidth_knee=0.5, interference=0.2, source="an example")
GPU = replace(WHOLE, sharing=SHARING)  # of 100 multiprocessors


def test_all_multiprocessors_are_the_plain_model():
    assert gpu_with(GPU, sms=100) is GPU
    assert gpu_with(WHOLE, sms=100) is WHOLE  # nothing need be known about sharing


def test_multiplication_goes_with_its_multiprocessors():
    # 2 ms on all 100, as test_efficiency has it.
    assert forward_s(gpu_with(GPU, sms=25), MATMUL) == pytest.approx(8e-3)


@pytest.mark.parametrize(("sms", "expected_s"), [(100, 1.25e-3), (50, 1.25e-3), (25, 2.5e-3)])
def test_memory_is_as_fast_down_to_the_knee(sms, expected_s):
    # 1e9 bytes / (1e12 * 0.8), and twice that with half of the knee's multiprocessors
    assert memory_s(gpu_with(GPU, sms=sms), 1e9) == pytest.approx(expected_s)


def test_bandwidth_share_makes_what_memory_bounds_longer_and_nothing_else():
    half = gpu_with(GPU, sms=50, bandwidth_share=0.5)

    assert memory_s(half, 1e9) == pytest.approx(2 * memory_s(GPU, 1e9))
    assert forward_s(half, MATMUL) == forward_s(gpu_with(GPU, sms=50), MATMUL)


def test_tiny_operation_is_no_slower_on_few_multiprocessors():
    # Half size 8e6 bytes: 10 us at the limit of 8e11 bytes/s, whatever the size. 1 byte adds
    # next to nothing to them on 10 multiprocessors, too.
    gpu = replace(GPU, curves={"elementwise": Curve(peak_share=0.8, half_size=8e6)})

    assert memory_s(gpu, 1) == pytest.approx(1e-5, rel=1e-5)
    assert memory_s(gpu_with(gpu, sms=10), 1) == pytest.approx(1e-5, rel=1e-5)


def test_operation_that_does_not_fill_the_gpu_takes_turns_with_itself_on_less_of_it():
    # At the limits of 8e11 bytes/s and 5e14 FLOP/s: 10 us to launch, 40 us besides of attention
    # that computes next to nothing. Half the multiprocessors make 10 + (40 - 10) / 0.5 of it.
    curves = {
        "elementwise": Curve(peak_share=0.8, half_size=8e6),
        "attention.forward": Curve(peak_share=0.5, half_size=2e10),
    }
    it = MATMUL._replace(curve="attention", flops=1, forward_bytes=0)
    gpu = replace(GPU, curves=curves)

    assert forward_s(gpu, it) == pytest.approx(4e-5)
    assert forward_s(gpu_with(gpu, sms=50), it) == pytest.approx(7e-5)


def test_gpu_that_nobody_knows_to_share_is_refused():
    with pytest.raises(PlanError, match=r"gpu g: sharing must be given .*profile --sharing"):
        gpu_with(WHOLE, sms=50)


def test_measured_rates_count_and_join_in_lines():
    rates = {"matmul": {25: 0.3, 75: 0.8}}
    known = replace(SHARING, rates=rates)

    def rate(sms, curve="matmul.bf16"):
        return rate_share(known, curve, sms=sms, num_sms=100)

    # 25 and 75 as measured, 50 half-way between; (0, 0) and (100, 1) are the ends.
    assert [rate(sms) for sms in (25, 50, 75, 100)] == [0.3, pytest.approx(0.55), 0.8, 1.0]
    assert rate(5) == pytest.approx(0.06)
    # Gradients of weights and multiplications of experts go like others, attention does not.
    assert rate(25, "weight_gradient.matmul.bf16") == rate(25, "grouped_matmul.fp8") == 0.3
    assert rate(25, "weight_gradient.grouped_matmul.bf16") == 0.3
    assert rate(25, "attention.forward") == 0.25


def test_exact_kind_counts_before_what_is_like_it():
    rates = {"matmul": {50: 0.6}, "matmul.fp8": {50: 0.7}, "grouped_matmul": {50: 0.4}}
    known = replace(SHARING, rates=rates)

    curves = ("matmul.bf16", "matmul.fp8", "grouped_matmul.bf16")
    assert [rate_share(known, curve, sms=50, num_sms=100) for curve in curves] == [0.6, 0.7, 0.4]


def test_passes_of_attention_have_rates_of_their_own():
    rates = {"attention.forward": {50: 0.6}, "attention.backward": {50: 0.7}}
    known = replace(SHARING, rates=rates)

    curves = ("attention.forward", "attention.backward", "latent_attention.backward")
    assert [rate_share(known, curve, sms=50, num_sms=100) for curve in curves] == [0.6, 0.7, 0.7]


def test_stair_is_a_table_of_rates():
    stair = {sms: static_grid_rate(sms, num_sms=132) for sms in range(8, 133, 4)}
    known = SharingCurves(bandwidth_knee=0.5, interference=0.0, rates={"attention": stair})
    gpu = replace(load_gpu("h200"), sharing=known)

    slower = gpu_with(gpu, sms=100).curves["attention.forward"]

    assert slower.peak_share == pytest.approx(0.5 * gpu.curves["attention.forward"].peak_share)


def test_quotas_that_fit_are_had_and_others_shared_in_proportion():
    assert sms_beside([32, 100], num_sms=132) == [32, 100]
    assert sms_beside([32, 32], num_sms=132) == [32, 32]
    assert sms_beside([None], num_sms=132) == [132]
    assert sms_beside([None, None], num_sms=132) == [66, 66]
    # 32 and all 132 are 164: 32 * 132 / 164 = 25.8, 132 * 132 / 164 = 106.2.
    assert sms_beside([32, None], num_sms=132) == [25, 106]


def test_passes_that_are_as_fast_as_the_host_launches_them_take_turns():
    # One thread launches for both: 1 + 1 of its time. The third is launched in a tenth of its own.
    found = slowdowns([Demand(0, 0, host=1.0)] * 2 + [Demand(0, 0, host=0.1)], [1.0] * 3,
                      interference=0.2)  # fmt: skip
    assert found == pytest.approx((2.1, 2.1, 1.0))


def test_passes_that_compute_do_not_slow_each_other():
    assert slowdowns([Demand(0.3, 0.0)] * 3, [1.0] * 3, interference=0.2) == (1.0, 1.0, 1.0)


def test_passes_that_both_take_all_bandwidth_take_twice_as_long_and_interfere():
    # (1 + (2 - 1) * 1) * (1 + 0.2 * 1 * 1)
    found = slowdowns([Demand(1.0, 1.0)] * 2, [1.0, 1.0], interference=0.2)
    assert found == pytest.approx((2.4, 2.4))


def test_only_what_waits_for_memory_is_longer():
    # Demand 1.5: the first waits half of its time, (1 + 0.5 * 0.5) * (1 + 0.2 * 0.7 * 0.5); the
    # second not at all.
    found = slowdowns([Demand(0.8, 0.5), Demand(0.7, 0.0)], [1.0, 1.0], interference=0.2)
    assert found == pytest.approx((1.25 * 1.07, 1.0))


shares = st.floats(0, 1)
demands = st.builds(Demand, shares, shares, shares)


@given(demands)
def test_pass_alone_is_no_slower(demand):
    assert slowdowns([demand], [1.0], interference=0.2) == (1.0,)


@given(st.lists(demands, min_size=1, max_size=5), demands)
def test_more_neighbours_never_make_a_pass_faster(passes, other):
    alone = slowdowns(passes, [1.0] * len(passes), interference=0.2)
    beside = slowdowns([*passes, other], [1.0] * (len(passes) + 1), interference=0.2)

    assert all(b >= a - 1e-12 for a, b in zip(alone, beside, strict=False))


@given(
    st.lists(st.one_of(st.none(), st.integers(8, 132)), min_size=1, max_size=5),
    st.one_of(st.none(), st.integers(8, 132)),
)
def test_more_neighbours_never_leave_more_multiprocessors(quotas, other):
    before = sms_beside(quotas, num_sms=132)
    after = sms_beside([*quotas, other], num_sms=132)

    assert all(b <= a for a, b in zip(before, after, strict=False))


@given(
    st.integers(1, 131),
    st.floats(1e3, 1e13),
    st.floats(1e3, 1e10),
    st.sampled_from(["matmul", "grouped_matmul", "attention", "elementwise"]),
)
def test_more_multiprocessors_are_never_slower(sms, flops, moved_bytes, curve):
    gpu = load_gpu("h200")
    flops = 0.0 if curve == "elementwise" else flops
    it = MATMUL._replace(curve=curve, flops=flops, forward_bytes=moved_bytes, smallest=64)

    fewer_s = forward_s(gpu_with(gpu, sms=sms), it)
    assert fewer_s >= forward_s(gpu_with(gpu, sms=sms + 1), it) * (1 - 1e-12)
