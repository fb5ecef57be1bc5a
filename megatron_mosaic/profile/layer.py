"""A whole layer, measured and estimated: whether the fitted operations add up to what it takes."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from megatron_mosaic.cluster.spec import Cluster
from megatron_mosaic.cost.cost_model import CostModel
from megatron_mosaic.cost.sizes import ParallelSizes, TrainingSettings
from megatron_mosaic.model.layers import Layer, Mlp, SelfAttention
from megatron_mosaic.model.spec import LayerRun, ModelSpec, ModuleSpec
from megatron_mosaic.model.tokens import Distribution
from megatron_mosaic.profile.measurements import TimedPasses
from megatron_mosaic.profile.timing import Stopwatch


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerSizes:
    """Geometry of a layer with gated MLP, and the tokens of one sequence in it."""

    hidden_size: int
    num_heads: int
    ffn_hidden_size: int
    tokens: int


# By kind of device, and whether time is short: what fills the device, in bf16.
LAYER_SIZES: Mapping[tuple[str, bool], LayerSizes] = {
    ("cuda", False): LayerSizes(hidden_size=4096, num_heads=32, ffn_hidden_size=14336, tokens=8192),
    ("cuda", True): LayerSizes(hidden_size=2048, num_heads=16, ffn_hidden_size=8192, tokens=4096),
    ("cpu", False): LayerSizes(hidden_size=512, num_heads=4, ffn_hidden_size=2048, tokens=512),
    ("cpu", True): LayerSizes(hidden_size=256, num_heads=2, ffn_hidden_size=1024, tokens=128),
}


class DecoderLayer(nn.Module):
    """A decoder layer in torch's own operations: what Megatron computes, without its kernels."""

    def __init__(self, sizes: LayerSizes) -> None:
        super().__init__()
        hidden, ffn = sizes.hidden_size, sizes.ffn_hidden_size
        self._num_heads = sizes.num_heads
        self.attention_norm, self.mlp_norm = nn.RMSNorm(hidden), nn.RMSNorm(hidden)
        self.qkv = nn.Linear(hidden, 3 * hidden, bias=False)
        self.projection = nn.Linear(hidden, hidden, bias=False)
        self.gate_up = nn.Linear(hidden, 2 * ffn, bias=False)
        self.down = nn.Linear(ffn, hidden, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Computes the layer for ``[s, h]``."""
        heads = self.qkv(self.attention_norm(tokens)).unflatten(-1, (3, self._num_heads, -1))
        query, key, value = heads.permute(1, 2, 0, 3).unsqueeze(1)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        tokens = tokens + self.projection(mixed.squeeze(0).transpose(0, 1).flatten(1))
        gate, up = self.gate_up(self.mlp_norm(tokens)).chunk(2, dim=-1)
        return tokens + self.down(F.silu(gate) * up)


def time_layer(sizes: LayerSizes, stopwatch: Stopwatch) -> TimedPasses:
    """Times both passes of a layer on this rank."""
    device, dtype = stopwatch.device, torch.bfloat16
    layer = DecoderLayer(sizes).to(device, dtype)
    shape = (sizes.tokens, sizes.hidden_size)
    tokens = torch.randn(shape, device=device, dtype=dtype, requires_grad=True)
    gradient = torch.randn(shape, device=device, dtype=dtype)
    forward_s = stopwatch.median_s(lambda: layer(tokens))
    both_s = stopwatch.median_s(lambda: layer(tokens).backward(gradient))
    return TimedPasses(forward_s, both_s)


def estimate_layer(sizes: LayerSizes, cluster: Cluster) -> TimedPasses:
    """Estimates both passes of the same layer."""
    module = ModuleSpec(
        name="language",
        hidden_size=sizes.hidden_size,
        layers=(LayerRun(1, _spec(sizes)),),
        causal=True,
        items_per_sample=Distribution.constant(1),
        tokens_per_item=Distribution.constant(sizes.tokens),
    )
    model = ModelSpec(name="layer", modules={"language": module})
    # torch adds up gradients in the precision of the weights.
    costs = CostModel(model, cluster, TrainingSettings(gradient_bytes=2))
    found = costs.module("language", ParallelSizes(), samples=1).layers[0].costs
    backward_s = found.input_gradient_s + found.weight_gradient_s
    return TimedPasses(found.forward_s, found.forward_s + backward_s)


def _spec(sizes: LayerSizes) -> Layer:
    head_dim = sizes.hidden_size // sizes.num_heads
    mixer = SelfAttention(
        num_heads=sizes.num_heads, num_query_groups=sizes.num_heads, head_dim=head_dim
    )
    return Layer(mixer=mixer, mlp=Mlp(ffn_hidden_size=sizes.ffn_hidden_size, gated=True))
