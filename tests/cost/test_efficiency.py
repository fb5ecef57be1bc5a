import pytest

from megatron_mosaic.cluster.cluster_file import load_gpu, shipped_gpus
from megatron_mosaic.cluster.spec import Curve, Gpu
from megatron_mosaic.cost.efficiency import (
    find_curve,
    forward_s,
    input_gradient_s,
    memory_s,
    weight_gradient_s,
)
from megatron_mosaic.cost.operations import Operation
from megatron_mosaic.errors import PlanError

GPU = Gpu(
    name="g",
    memory_bytes=1e9,
    matmul_flops_per_s={"bf16": 1e15, "fp8": 2e15},
    memory_bytes_per_s=1e12,
    num_sms=100,
    curves={
        "matmul.bf16": Curve(peak_share=0.5),
        "attention.forward": Curve(peak_share=0.5),
        "attention.backward": Curve(peak_share=0.25),
        "elementwise": Curve(peak_share=0.8),
    },
)
MATMUL = Operation(
    "matmul", flops=1e12, backward_flops=1e12, forward_bytes=1e8, backward_bytes=1e8, weights=1e7
)


def test_multiplication_takes_what_its_share_of_the_peak_allows():
    # 1e12 / (1e15 * 0.5)
    assert forward_s(GPU, MATMUL) == pytest.approx(2e-3)


def test_multiplication_with_little_to_compute_takes_what_memory_allows():
    # 1e8 bytes / (1e12 * 0.8)
    assert forward_s(GPU, MATMUL._replace(flops=1e9)) == pytest.approx(1.25e-4)


def test_gradient_of_weights_reads_and_writes_what_is_accumulated():
    # 1e8 bytes of operands, of which 2 * 1e7 are weights; 2 * 4 * 1e7 of gradients.
    small = MATMUL._replace(flops=1.0)
    assert weight_gradient_s(GPU, small, gradient_bytes=4) == pytest.approx(1.6e8 / 0.8e12)


def test_attention_has_a_curve_for_each_pass():
    attention = Operation("attention", flops=1e12, backward_flops=2.5e12)

    assert forward_s(GPU, attention) == pytest.approx(2e-3)
    assert input_gradient_s(GPU, attention) == pytest.approx(1e-2)


def test_curve_halves_at_its_half_sizes():
    curve = Curve(peak_share=0.8, half_size=1e9, half_dim=128)

    assert curve.share(1e9) == pytest.approx(0.4)
    assert curve.share(1e30, smallest=128) == pytest.approx(0.4)


def test_precision_without_a_curve_uses_the_next_one():
    assert find_curve(GPU, "matmul", "nvfp4") == GPU.curves["matmul.bf16"]


def test_operation_without_a_curve_is_named():
    with pytest.raises(PlanError, match=r"gpu g: curves=.* must have one for recurrence; add it"):
        find_curve(GPU, "recurrence", "bf16")


def test_nothing_moved_takes_no_time():
    assert memory_s(GPU, 0) == 0.0


@pytest.mark.parametrize("name", shipped_gpus())
def test_shipped_gpus_have_curves_for_all_operations(name):
    gpu = load_gpu(name)

    for curve in (
        "matmul", "grouped_matmul", "attention.forward", "attention.backward",
        "latent_attention.forward", "latent_attention.backward", "recurrence", "elementwise",
        "permute",
    ):  # fmt: skip
        assert 0 < find_curve(gpu, curve, "bf16").peak_share <= 1


@pytest.mark.parametrize("name", shipped_gpus())
def test_shipped_curves_say_where_they_are_from(name):
    sources = {curve.source for curve in load_gpu(name).curves.values()}

    assert sources
    assert not {source for source in sources if not source or "starting value" in source}
