"""What layers keep from the forward to the backward pass, tensor by tensor."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

from megatron_mosaic.cost.sizes import ParallelSizes
from megatron_mosaic.layout.placement import Recompute
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
from megatron_mosaic.model.spec import ModuleSpec, Patches, Precision, TokenEmbedding

Kernels = Literal["flash", "unfused", "local"]
"""Who computes: Transformer Engine with flash attention, Megatron's own fused softmax on a GPU
(which keeps the scores), or Megatron's local layers in plain torch, as on a CPU."""

# Bytes of a number that a matrix multiplication keeps of its input for the weights' gradient.
# Block scales included: one byte per 32 numbers (MXFP8), one per 16 (NVFP4). Source: OCP
# Microscaling Formats v1.0, section 5.2; NVIDIA Transformer Engine, "Using FP8 and FP4".
KEPT_INPUT_BYTES: dict[Precision, float] = {
    "fp32": 4,
    "fp16": 2,
    "bf16": 2,
    "fp8": 1,
    "mxfp8": 1 + 1 / 32,
    "nvfp4": 1 / 2 + 1 / 16,
}


class Kept(NamedTuple):
    """A tensor that stays until the backward pass.

    Args:
        name: What it is.
        bytes: On one rank, for one task.
        weights_only: Whether nothing but the gradient of weights needs it.
    """

    name: str
    bytes: float
    weights_only: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskOnRank:
    """One task of a module on one of its ranks, as far as what it keeps depends on it.

    Args:
        tokens: Tokens that the rank shares with its tensor-parallel peers alone.
        pairs: Query and key positions of one head, whether the mask hides them or not.
        longest: Tokens of the longest item.
        hidden_size: Size of a token.
        norm: What layers normalise with.
        causal: Whether a mask of positions exists.
        rotary: Whether queries and keys are rotated.
        sizes: How the module is split.
        precision: Of matrix multiplications.
        kernels: Who computes.
        dropout: Whether layers and scores drop out.
    """

    tokens: float
    pairs: float
    longest: float
    hidden_size: int
    norm: Literal["rms", "layer"] = "rms"
    causal: bool = True
    rotary: bool = True
    sizes: ParallelSizes
    precision: Precision = "bf16"
    kernels: Kernels = "flash"
    dropout: bool = False

    @classmethod
    def of(
        cls,
        module: ModuleSpec,
        *,
        sizes: ParallelSizes,
        samples: float,
        precision: Precision = "bf16",
        kernels: Kernels = "flash",
        dropout: bool = False,
    ) -> "TaskOnRank":
        """Returns the task of a module on a number of samples.

        Args:
            module: The module.
            sizes: How it is split.
            samples: Samples of the task on one replica.
            precision: Of matrix multiplications.
            kernels: Who computes.
            dropout: Whether layers and scores drop out.
        """
        source = module.input
        learned = source.num_positions if isinstance(source, TokenEmbedding | Patches) else 0
        items = samples * module.items_per_sample.mean
        return cls(
            tokens=items * module.tokens_per_item.mean / sizes.cp,
            pairs=items * module.tokens_per_item.mean_square / sizes.cp,
            longest=module.tokens_per_item.largest,
            hidden_size=module.hidden_size,
            norm=module.norm,
            causal=module.causal,
            rotary=not learned,
            sizes=sizes,
            precision=precision,
            kernels=kernels,
            dropout=dropout,
        )

    @property
    def number_bytes(self) -> int:
        """Bytes of a number between operations."""
        return 4 if self.precision == "fp32" else 2

    @property
    def input_bytes(self) -> float:
        """Bytes of a number that a multiplication keeps; CPUs have no narrow formats."""
        return self.number_bytes if self.kernels == "local" else KEPT_INPUT_BYTES[self.precision]

    @property
    def outer_tokens(self) -> float:
        """Tokens outside the tensor-parallel regions."""
        return self.tokens / (self.sizes.tp if self.sizes.sequence_parallel else 1)


def total_bytes(
    kept: Iterable[Kept], *, trains: bool = True, gradient_passes: bool = True
) -> float:
    """Adds up what a part keeps.

    Args:
        kept: Its tensors.
        trains: Whether weights of the part train.
        gradient_passes: Whether something trains upstream of it.
    """
    if not trains and not gradient_passes:
        return 0.0
    return sum(tensor.bytes for tensor in kept if trains or not tensor.weights_only)


def layer_keeps(
    layer: Layer, task: TaskOnRank, *, recompute: Recompute | None = None
) -> tuple[Kept, ...]:
    """Lists what one layer keeps for its backward pass.

    Args:
        layer: The layer.
        task: Its task.
        recompute: What the backward pass computes again.

    Source:
        Korthikanti et al., arXiv 2205.05198, section 4, for the kinds of tensors; measured on
        Megatron-Core 0.19 by ``tests/cost/test_memory_truth.py``.
    """
    if recompute == "full":
        size = task.number_bytes * task.outer_tokens * task.hidden_size
        return (Kept("input of the layer", size),)
    parts: list[Kept] = []
    if layer.mixer is not None:
        parts += norm_keeps(task, width=task.hidden_size, tokens=task.outer_tokens)
        parts += _mixer_keeps(layer.mixer, task, selective=recompute == "selective")
        parts += _dropout_keeps(task)
    if layer.mlp is not None:
        parts += norm_keeps(task, width=task.hidden_size, tokens=task.outer_tokens)
        if isinstance(layer.mlp, Mlp):
            parts += _mlp_keeps(layer.mlp, task)
        else:
            parts += _experts_keep(layer.mlp, task)
        parts += _dropout_keeps(task)
    return tuple(parts)


def norm_keeps(task: TaskOnRank, *, width: float, tokens: float) -> Iterator[Kept]:
    """Yields what a norm over ``width`` numbers keeps."""
    if task.kernels == "local" and task.norm == "rms":
        # Torch computes it from parts, in fp32: the input, and the quotient for the weight.
        yield Kept("input of a norm", 4 * tokens * width)
        yield Kept("statistics of a norm", 4 * tokens)
        yield Kept("normalised input", 4 * tokens * width, weights_only=True)
        return
    yield Kept("input of a norm", task.number_bytes * tokens * width)
    statistics = 1 if task.norm == "rms" else 2
    size = task.number_bytes if task.kernels == "local" else 4
    yield Kept("statistics of a norm", statistics * size * tokens)


def _dropout_keeps(task: TaskOnRank) -> Iterator[Kept]:
    if task.dropout:
        size = _mask_bytes(task) * task.outer_tokens * task.hidden_size
        yield Kept("mask of dropout", size)


def _mask_bytes(task: TaskOnRank) -> int:
    # On a CPU torch multiplies with noise; its CUDA kernel keeps a bool.
    return task.number_bytes if task.kernels == "local" else 1


def _input_of(name: str, task: TaskOnRank, *, tokens: float, width: float) -> Kept:
    return Kept(f"input of {name}", task.input_bytes * tokens * width, weights_only=True)


def _mixer_keeps(mixer: Mixer, task: TaskOnRank, *, selective: bool) -> Iterator[Kept]:
    match mixer:
        case SelfAttention():
            yield from _attention_keeps(mixer, task, selective=selective)
        case LatentAttention():
            yield from _latent_attention_keeps(mixer, task, selective=selective)
        case LinearAttention():
            yield from _linear_attention_keeps(mixer, task)
        case StateSpace():
            yield from _state_space_keeps(mixer, task)


def _attention_keeps(mixer: SelfAttention, task: TaskOnRank, *, selective: bool) -> Iterator[Kept]:
    tp = task.sizes.tp
    queries = mixer.num_heads * mixer.head_dim / tp
    # With fewer groups than ranks, ranks share a group and each has all of it.
    keys = max(mixer.num_query_groups / tp, 1) * mixer.head_dim
    row_bytes = task.number_bytes * task.tokens
    yield _input_of("the joint projection", task, tokens=task.outer_tokens, width=task.hidden_size)
    if mixer.qk_norm:
        for width in (queries, keys):
            heads = width / mixer.head_dim
            yield from norm_keeps(task, width=mixer.head_dim, tokens=task.tokens * heads)
    if mixer.output_gate:
        yield Kept("gate of the output", row_bytes * queries)
        yield Kept("gated output", row_bytes * queries, weights_only=True)
    if task.kernels == "local" and task.rotary:
        # Sine and cosine, for queries and for keys.
        yield Kept("tables of rotation", 4 * task.number_bytes * task.longest * mixer.head_dim)
    if task.kernels == "local":
        yield from _local_operands(mixer, task, queries=queries, keys=keys, selective=selective)
    else:
        yield Kept("queries, keys and values", row_bytes * (queries + 2 * keys))
    heads = mixer.num_heads / tp
    yield from _core_attention_keeps(
        task, heads=heads, width=queries, selective=selective, window=mixer.window
    )


def _local_operands(
    mixer: SelfAttention, task: TaskOnRank, *, queries: float, keys: float, selective: bool
) -> Iterator[Kept]:
    """Yields queries, keys and values as torch's views and copies hold them."""
    row_bytes = task.number_bytes * task.tokens
    joint = Kept("joint projection, for its values", row_bytes * (queries + 2 * keys))
    grouped = mixer.num_query_groups < mixer.num_heads
    if grouped and not selective:
        yield Kept("queries, repeated keys and values", row_bytes * 3 * queries)
        return
    copied = task.rotary or mixer.qk_norm
    if copied:
        yield Kept("queries and keys", row_bytes * (queries + keys))
    elif grouped:
        yield Kept("queries", row_bytes * queries)
    yield joint


def _core_attention_keeps(
    task: TaskOnRank, *, heads: float, width: float, selective: bool, window: int | None = None
) -> Iterator[Kept]:
    """Yields what the attention operator itself keeps, and the projection behind it."""
    output = task.number_bytes * task.tokens * width
    if task.kernels == "flash":
        yield Kept("output of attention", output, weights_only=selective)
        if task.precision in ("fp8", "mxfp8", "nvfp4"):
            yield _input_of("the output projection", task, tokens=task.tokens, width=width)
        if not selective:
            yield Kept("sums of exponentials", 4 * task.tokens * heads)
        return
    yield Kept("output of attention", output, weights_only=True)
    if selective:
        return
    scores = task.pairs * heads
    if task.kernels == "local" and (task.causal or window is not None):
        yield Kept("mask of positions", task.longest**2)
    if task.kernels == "local" and task.number_bytes == 2:
        yield Kept("softmax in fp32", 4 * scores)
    elif task.kernels == "unfused" or task.dropout:
        yield Kept("softmax", task.number_bytes * scores)
    if task.dropout:
        yield Kept("mask of the scores' dropout", _mask_bytes(task) * scores)
    if task.kernels == "local" or task.dropout:
        yield Kept("probabilities", task.number_bytes * scores)


def _latent_attention_keeps(
    mixer: LatentAttention, task: TaskOnRank, *, selective: bool
) -> Iterator[Kept]:
    heads = mixer.num_heads / task.sizes.tp
    size, rank, outer = task.number_bytes, mixer.key_value_rank, task.outer_tokens
    yield _input_of("the maps into latents", task, tokens=outer, width=task.hidden_size)
    if mixer.query_rank is not None:
        yield from norm_keeps(task, width=mixer.query_rank, tokens=outer)
        yield _input_of("the queries' map", task, tokens=outer, width=mixer.query_rank)
    yield from norm_keeps(task, width=rank, tokens=outer)
    yield _input_of("the keys' and values' map", task, tokens=outer, width=rank)
    query_width = heads * (mixer.head_dim + mixer.rotary_head_dim)
    value_width = heads * mixer.value_head_dim
    operands = 2 * query_width + value_width
    yield Kept("queries, keys and values", size * task.tokens * operands)
    yield from _core_attention_keeps(task, heads=heads, width=value_width, selective=selective)


def _linear_attention_keeps(mixer: LinearAttention, task: TaskOnRank) -> Iterator[Kept]:
    keys = mixer.num_key_heads * mixer.key_head_dim / task.sizes.tp
    values = mixer.num_value_heads * mixer.value_head_dim / task.sizes.tp
    heads = mixer.num_value_heads / task.sizes.tp
    row_bytes = task.number_bytes * task.tokens
    yield _input_of("the joint projection", task, tokens=task.outer_tokens, width=task.hidden_size)
    yield Kept("joint projection", row_bytes * (2 * keys + 2 * values + 2 * heads))
    yield Kept("queries, keys and values", row_bytes * (2 * keys + values))
    yield Kept("decays", 4 * task.tokens * heads)
    yield Kept("output of attention", row_bytes * values)
    yield _input_of("the output projection", task, tokens=task.tokens, width=values)


def _state_space_keeps(mixer: StateSpace, task: TaskOnRank) -> Iterator[Kept]:
    tp = task.sizes.tp
    inner = mixer.num_heads * mixer.head_dim / tp
    maps = 2 * mixer.num_groups * mixer.state_size / tp
    row_bytes = task.number_bytes * task.tokens
    yield _input_of("the joint projection", task, tokens=task.outer_tokens, width=task.hidden_size)
    yield Kept("joint projection", row_bytes * (2 * inner + maps + mixer.num_heads / tp))
    yield Kept("output of the scan", row_bytes * inner)
    yield _input_of("the output projection", task, tokens=task.tokens, width=inner)


def _mlp_keeps(mlp: Mlp, task: TaskOnRank) -> Iterator[Kept]:
    yield _input_of("the MLP", task, tokens=task.outer_tokens, width=task.hidden_size)
    yield from _inner_mlp_keeps(mlp, task, tokens=task.tokens, tp=task.sizes.tp)


def _inner_mlp_keeps(mlp: Mlp, task: TaskOnRank, *, tokens: float, tp: int) -> Iterator[Kept]:
    made = mlp.ffn_hidden_size * (2 if mlp.gated else 1) / tp
    yield Kept("input of the activation function", task.number_bytes * tokens * made)
    yield _input_of("the second map", task, tokens=tokens, width=mlp.ffn_hidden_size / tp)


def _experts_keep(mlp: Experts, task: TaskOnRank) -> Iterator[Kept]:
    """Yields what experts keep if every expert gets as many tokens.

    Tokens that the ranks of an expert's group send each other balance out, so a rank's experts
    work on as many tokens as the rank has, times the experts of each.
    """
    outer, hidden = task.outer_tokens, task.hidden_size
    yield Kept("input of the router", task.number_bytes * outer * hidden, weights_only=True)
    yield from _routing_keeps(mlp, task)
    if mlp.shared_ffn_hidden_size:
        shared = Mlp(ffn_hidden_size=mlp.shared_ffn_hidden_size, gated=mlp.gated)
        yield from _inner_mlp_keeps(shared, task, tokens=task.tokens, tp=task.sizes.tp)
    size = mlp.latent_size or hidden
    # Ranks that split an expert gather each other's tokens.
    sent = task.tokens / task.sizes.tp * task.sizes.etp * mlp.experts_per_token
    if not task.sizes.sequence_parallel:
        sent = task.tokens * mlp.experts_per_token
    yield _input_of("the experts", task, tokens=sent, width=size)
    expert = Mlp(ffn_hidden_size=mlp.ffn_hidden_size, gated=mlp.gated)
    yield Kept("weights of the sent tokens", task.number_bytes * sent)
    yield from _inner_mlp_keeps(expert, task, tokens=sent, tp=task.sizes.etp)


def _routing_keeps(mlp: Experts, task: TaskOnRank) -> Iterator[Kept]:
    if task.kernels == "local":
        # Index of each choice and of its place (int64), its probability (fp32), and the order of
        # all pairs of token and expert.
        numbers = (8 + 8 + 4) * mlp.experts_per_token + 8 * mlp.num_experts
        yield Kept("routing", numbers * task.outer_tokens)
        return
    # Probabilities in fp32, and a map of both directions in int32, for every expert.
    yield Kept("routing", (4 + 2 * 4) * mlp.num_experts * task.outer_tokens)
