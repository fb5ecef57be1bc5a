"""Weights of a module and of its parts, in all and on one rank as Megatron splits them."""

from dataclasses import dataclass
from math import ceil
from typing import Literal

from megatron_mosaic.model.layers import (
    Experts,
    LatentAttention,
    Layer,
    LinearAttention,
    Mixer,
    Mlp,
    SelfAttention,
    StateSpace,
)
from megatron_mosaic.model.spec import LanguageHead, ModuleSpec, Patches, Projector, TokenEmbedding

Norm = Literal["rms", "layer"]

VOCAB_MULTIPLE = 128
"""Megatron's default of ``--make-vocab-size-divisible-by``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Parameters:
    """Numbers of weights.

    Args:
        dense: All but those of routed experts.
        experts: Of routed experts, which have data-parallel groups of their own.
        active_experts: Of the experts that one token goes to; meaningful for whole modules.
    """

    dense: int = 0
    experts: int = 0
    active_experts: int = 0

    def __add__(self, other: "Parameters") -> "Parameters":
        return Parameters(
            dense=self.dense + other.dense,
            experts=self.experts + other.experts,
            active_experts=self.active_experts + other.active_experts,
        )

    def __mul__(self, count: int) -> "Parameters":
        return Parameters(
            dense=self.dense * count,
            experts=self.experts * count,
            active_experts=self.active_experts * count,
        )

    @property
    def total(self) -> int:
        """All of them."""
        return self.dense + self.experts

    @property
    def active(self) -> int:
        """Those that a token meets."""
        return self.dense + self.active_experts


def padded_vocab_size(vocab_size: int, *, tp: int = 1, multiple: int = VOCAB_MULTIPLE) -> int:
    """Rows of the word embedding: every tensor-parallel rank has a multiple of some number."""
    return ceil(vocab_size / (multiple * tp)) * multiple * tp


def norm_parameters(size: int, *, norm: Norm) -> int:
    """Weights of a norm; a layer norm has biases too."""
    return size * (2 if norm == "layer" else 1)


def layer_parameters(
    layer: Layer, *, hidden_size: int, norm: Norm = "rms", tp: int = 1, ep: int = 1, etp: int = 1
) -> Parameters:
    """Counts the weights of a layer that one rank holds.

    Args:
        layer: The layer.
        hidden_size: Size of a token.
        norm: What the layer normalises with, before each of its parts.
        tp: Tensor-parallel size.
        ep: Parts into which the list of experts is split.
        etp: Ranks that split each expert.

    Note:
        Norms, routers, maps into latents, and biases that are added after a reduction over
        tensor-parallel ranks are on every rank.
    """
    result = Parameters()
    if layer.mixer is not None:
        norms = norm_parameters(hidden_size, norm=norm)
        weights = _mixer_parameters(layer.mixer, hidden_size=hidden_size, norm=norm, tp=tp)
        result += Parameters(dense=norms + weights)
    if layer.mlp is not None:
        result += Parameters(dense=norm_parameters(hidden_size, norm=norm))
        if isinstance(layer.mlp, Mlp):
            result += Parameters(dense=_mlp_parameters(layer.mlp, hidden_size=hidden_size, tp=tp))
        else:
            result += _experts_parameters(layer.mlp, hidden_size=hidden_size, tp=tp, ep=ep, etp=etp)
    return result


def _mixer_parameters(mixer: Mixer, *, hidden_size: int, norm: Norm, tp: int) -> int:
    match mixer:
        case SelfAttention():
            return _attention_parameters(mixer, hidden_size=hidden_size, norm=norm, tp=tp)
        case LatentAttention():
            return _latent_parameters(mixer, hidden_size=hidden_size, norm=norm, tp=tp)
        case LinearAttention():
            return _linear_attention_parameters(mixer, hidden_size=hidden_size, tp=tp)
        case StateSpace():
            return _state_space_parameters(mixer, hidden_size=hidden_size, tp=tp)


def _attention_parameters(mixer: SelfAttention, *, hidden_size: int, norm: Norm, tp: int) -> int:
    queries = mixer.num_heads * mixer.head_dim
    # With fewer groups than ranks Megatron still cuts the joint projection evenly, and gathers.
    made = queries + 2 * mixer.num_query_groups * mixer.head_dim
    made += queries if mixer.output_gate else 0
    weights = (made + queries) * hidden_size // tp
    if mixer.bias or mixer.qkv_bias:
        weights += made // tp
    if mixer.bias:
        weights += hidden_size
    if mixer.qk_norm:
        weights += 2 * norm_parameters(mixer.head_dim, norm=norm)
    return weights


def _latent_parameters(mixer: LatentAttention, *, hidden_size: int, norm: Norm, tp: int) -> int:
    heads, rank = mixer.num_heads, mixer.key_value_rank
    query_size = heads * (mixer.head_dim + mixer.rotary_head_dim)
    if mixer.query_rank is None:
        weights = hidden_size * query_size // tp
    else:
        weights = hidden_size * mixer.query_rank + mixer.query_rank * query_size // tp
        weights += norm_parameters(mixer.query_rank, norm=norm)
    weights += hidden_size * (rank + mixer.rotary_head_dim) + norm_parameters(rank, norm=norm)
    weights += rank * heads * (mixer.head_dim + mixer.value_head_dim) // tp
    return weights + heads * mixer.value_head_dim * hidden_size // tp


def _linear_attention_parameters(mixer: LinearAttention, *, hidden_size: int, tp: int) -> int:
    keys = mixer.num_key_heads * mixer.key_head_dim
    values = mixer.num_value_heads * mixer.value_head_dim
    # Queries, keys, values, output gate, and per head a write strength and a decay.
    made = 2 * keys + 2 * values + 2 * mixer.num_value_heads
    convolved = (2 * keys + values) * mixer.convolution_width
    split = made * hidden_size + convolved + 2 * mixer.num_value_heads + values * hidden_size
    return split // tp + mixer.value_head_dim


def _state_space_parameters(mixer: StateSpace, *, hidden_size: int, tp: int) -> int:
    inner = mixer.num_heads * mixer.head_dim
    maps = 2 * mixer.num_groups * mixer.state_size
    made = 2 * inner + maps + mixer.num_heads
    convolved = (inner + maps) * (mixer.convolution_width + 1)
    per_head = 3 * mixer.num_heads  # time step's bias, decay, skip
    return (made * hidden_size + convolved + per_head + inner + inner * hidden_size) // tp


def _mlp_parameters(mlp: Mlp, *, hidden_size: int, tp: int) -> int:
    made = mlp.ffn_hidden_size * (2 if mlp.gated else 1)
    weights = (made + mlp.ffn_hidden_size) * hidden_size // tp
    return weights + (made // tp + hidden_size if mlp.bias else 0)


def _experts_parameters(
    mlp: Experts, *, hidden_size: int, tp: int, ep: int, etp: int
) -> Parameters:
    size = mlp.latent_size or hidden_size
    expert = Mlp(ffn_hidden_size=mlp.ffn_hidden_size, gated=mlp.gated, bias=mlp.bias)
    expert_parameters = _mlp_parameters(expert, hidden_size=size, tp=etp)
    dense = mlp.num_experts * hidden_size
    if mlp.latent_size:
        dense += 2 * hidden_size * mlp.latent_size
    if mlp.shared_ffn_hidden_size:
        shared = Mlp(ffn_hidden_size=mlp.shared_ffn_hidden_size, gated=mlp.gated, bias=mlp.bias)
        dense += _mlp_parameters(shared, hidden_size=hidden_size, tp=tp)
        dense += hidden_size if mlp.shared_gate else 0
    return Parameters(
        dense=dense,
        experts=expert_parameters * mlp.num_experts // ep,
        active_experts=expert_parameters * mlp.experts_per_token,
    )


def adapter_parameters(layer: Layer, *, hidden_size: int, lora_rank: int, tp: int = 1) -> int:
    """Counts the weights of the low-rank adapters beside a layer's four projections, on a rank.

    All experts of a rank share the adapters of their layer, as in Megatron-Bridge.

    Source:
        Sizes: LoRA, arXiv 2106.09685, section 4.1: ``rank * (inputs + outputs)``.
    """
    ends = 0
    if isinstance(layer.mixer, SelfAttention):
        queries = layer.mixer.num_heads * layer.mixer.head_dim
        made = queries + 2 * layer.mixer.num_query_groups * layer.mixer.head_dim
        ends += hidden_size + made + queries + hidden_size
    if layer.mlp is not None:
        ffn = layer.mlp.ffn_hidden_size
        ends += 2 * hidden_size + ffn * (3 if layer.mlp.gated else 2)
    return lora_rank * ends // tp


def input_parameters(module: ModuleSpec, *, tp: int = 1, multiple: int = VOCAB_MULTIPLE) -> int:
    """Counts the weights on one rank of what makes a module's first tokens."""
    hidden = module.hidden_size
    match module.input:
        case TokenEmbedding(vocab_size=vocab_size, num_positions=num_positions):
            rows = padded_vocab_size(vocab_size, tp=tp, multiple=multiple) // tp
            return (rows + num_positions) * hidden
        case Patches() as patches:
            rows = patches.values + patches.num_positions + patches.extra_tokens
            biases = hidden if patches.bias else 0
            norms = norm_parameters(hidden, norm=module.norm) if patches.normed else 0
            return rows * hidden + biases + norms
        case None:
            return 0


def output_parameters(
    module: ModuleSpec, *, tp: int = 1, pp: int = 1, multiple: int = VOCAB_MULTIPLE
) -> int:
    """Counts the weights on one rank of the last stage beside its layers: norm and output.

    A tied head has no weights of its own where the embedding is on the same stage.
    """
    norms = norm_parameters(module.hidden_size, norm=module.norm) if module.final_norm else 0
    match module.output:
        case LanguageHead(tied=True) if pp == 1:
            return norms
        case LanguageHead(vocab_size=vocab_size):
            rows = padded_vocab_size(vocab_size, tp=tp, multiple=multiple) // tp
            return norms + rows * module.hidden_size
        case Projector() as projector:
            return norms + projector_parameters(projector, tp=tp)
        case None:
            return norms


def mtp_parameters(
    module: ModuleSpec,
    *,
    tp: int = 1,
    pp: int = 1,
    ep: int = 1,
    etp: int = 1,
    multiple: int = VOCAB_MULTIPLE,
) -> Parameters:
    """Counts the weights on one rank of what predicts further tokens.

    Each level has a layer like the last one, three norms, and a map of two tokens to one. Where
    the embedding is on another stage, the last one has a copy.

    Source:
        Megatron-Core 0.19, transformer/multi_token_prediction.py.
    """
    head = module.output
    if not isinstance(head, LanguageHead) or not head.mtp_layers:
        return Parameters()
    hidden = module.hidden_size
    *_, last = (run.layer for run in module.layers)
    level = layer_parameters(
        last, hidden_size=hidden, norm=module.norm, tp=tp, ep=ep, etp=etp
    ) + Parameters(dense=3 * norm_parameters(hidden, norm=module.norm) + 2 * hidden**2 // tp)
    copied = 0
    if pp > 1 and not head.tied:
        copied = padded_vocab_size(head.vocab_size, tp=tp, multiple=multiple) // tp * hidden
    return level * head.mtp_layers + Parameters(dense=copied)


def projector_parameters(projector: Projector, *, tp: int = 1) -> int:
    """Counts the weights of a projector on one rank: its maps are split by columns, then rows."""
    total = 0
    for index, (before, after) in enumerate(
        zip(projector.sizes, projector.sizes[1:], strict=False)
    ):
        total += before * after // tp
        if projector.bias:
            total += after // tp if index % 2 == 0 else after
    return total


def module_parameters(module: ModuleSpec, *, multiple: int = VOCAB_MULTIPLE) -> Parameters:
    """Counts a whole module's weights, without adapters and without what predicts further tokens.

    Published sizes leave the latter out: 671 of the 685 billion weights of DeepSeek-V3.

    Args:
        module: The module.
        multiple: To what the vocabulary is padded; 1 counts it as the model's authors do.
    """
    total = Parameters(
        dense=input_parameters(module, multiple=multiple)
        + output_parameters(module, multiple=multiple)
    )
    for count, layer in module.layers:
        total += layer_parameters(layer, hidden_size=module.hidden_size, norm=module.norm) * count
    return total
