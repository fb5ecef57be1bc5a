import pytest
import torch

from megatron_mosaic.cluster.shipped import load_cluster
from megatron_mosaic.profile.layer import (
    LAYER_SIZES,
    DecoderLayer,
    LayerSizes,
    estimate_layer,
    time_layer,
)
from megatron_mosaic.profile.timing import Stopwatch

TINY = LayerSizes(hidden_size=8, num_heads=2, ffn_hidden_size=12, tokens=5)


def test_layer_is_causal():
    torch.manual_seed(0)
    layer, tokens = DecoderLayer(TINY), torch.randn(5, 8)
    other = torch.cat([tokens[:3], torch.randn(2, 8)])

    # The first three tokens do not see those behind them.
    torch.testing.assert_close(layer(tokens)[:3], layer(other)[:3])
    assert not torch.allclose(layer(tokens)[3:], layer(other)[3:])


def test_layer_has_the_weights_of_its_geometry():
    weights = sum(parameter.numel() for parameter in DecoderLayer(TINY).parameters())

    # 4 * 8 * 8 of attention, 3 * 8 * 12 of a gated MLP, two norms.
    assert weights == 256 + 288 + 16


def test_both_passes_of_a_layer_are_timed():
    stopwatch = Stopwatch(device=torch.device("cpu"), budget_s=0.01)

    timed = time_layer(TINY, stopwatch)

    assert timed.forward_s > 0
    assert timed.both_s > 0


def test_estimate_of_a_layer_takes_the_curves_of_the_cluster():
    estimated = estimate_layer(LAYER_SIZES["cuda", False], load_cluster("h100"))

    # 2 * 8192 tokens * 4096 * (4 * 4096 + 3 * 14336) FLOPs, without attention, at 989.4 TFLOP/s.
    assert estimated.forward_s > 2 * 8192 * 4096 * 59392 / 989.4e12
    # The gradients of input and weights are as much work each.
    assert estimated.both_s == pytest.approx(3 * estimated.forward_s, rel=0.25)
