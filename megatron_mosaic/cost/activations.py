"""What layers keep from the forward to the backward pass, tensor by tensor."""

from collections.abc import Iterator

from megatron_mosaic.cost.kept import Kept, TaskOnRank, input_of, mask_bytes, norm_keeps
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

_DELTA_CHUNK = 64  # tokens that flash-linear-attention's gated delta rule treats at once


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


def _dropout_keeps(task: TaskOnRank) -> Iterator[Kept]:
    if task.dropout:
        size = mask_bytes(task) * task.outer_tokens * task.hidden_size
        yield Kept("mask of dropout", size)


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
    yield input_of("the joint projection", task, tokens=task.outer_tokens, width=task.hidden_size)
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
    if task.received and not selective:
        yield Kept("received keys and values", task.number_bytes * task.received * 2 * keys)
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
        if task.swaps_heads:
            yield Kept("output of attention before the swap", output)
        if task.precision in ("fp8", "mxfp8", "nvfp4"):
            yield input_of("the output projection", task, tokens=task.tokens, width=width)
        if not selective:
            yield Kept("sums of exponentials", 4 * task.tokens * heads)
        return
    yield Kept("output of attention", output, weights_only=True)
    if not selective:
        masked = task.causal or window is not None
        yield from _scores_keep(task, scores=task.pairs * heads, masked=masked)


def _scores_keep(task: TaskOnRank, *, scores: float, masked: bool) -> Iterator[Kept]:
    """Yields what attention keeps that writes its scores to memory."""
    local = task.kernels == "local"
    if local and masked:
        yield Kept("mask of positions", task.longest**2)
    if local and task.number_bytes == 2:
        yield Kept("softmax in fp32", 4 * scores)
    elif not local or task.dropout:
        yield Kept("softmax", task.number_bytes * scores)
    if task.dropout:
        yield Kept("mask of the scores' dropout", mask_bytes(task) * scores)
    if local or task.dropout:
        yield Kept("probabilities", task.number_bytes * scores)


def _latent_attention_keeps(
    mixer: LatentAttention, task: TaskOnRank, *, selective: bool
) -> Iterator[Kept]:
    heads = mixer.num_heads / task.sizes.tp
    size, rank, outer = task.number_bytes, mixer.key_value_rank, task.outer_tokens
    yield input_of("the maps into latents", task, tokens=outer, width=task.hidden_size)
    if mixer.query_rank is not None:
        yield from norm_keeps(task, width=mixer.query_rank, tokens=outer)
        yield input_of("the queries' map", task, tokens=outer, width=mixer.query_rank)
    yield from norm_keeps(task, width=rank, tokens=outer)
    yield input_of("the keys' and values' map", task, tokens=outer, width=rank)
    query_width = heads * (mixer.head_dim + mixer.rotary_head_dim)
    value_width = heads * mixer.value_head_dim
    operands = 2 * query_width + value_width
    yield Kept("queries, keys and values", size * task.tokens * operands)
    yield from _core_attention_keeps(task, heads=heads, width=value_width, selective=selective)


def _linear_attention_keeps(mixer: LinearAttention, task: TaskOnRank) -> Iterator[Kept]:
    """Yields what the gated delta rule keeps.

    Source:
        Megatron-Core 0.19, ssm/gated_delta_net, and what its kernels of flash-linear-attention
        save; not measured here, where they do not run.
    """
    tp = task.sizes.tp
    keys = mixer.num_key_heads * mixer.key_head_dim / tp
    values = mixer.num_value_heads * mixer.value_head_dim / tp
    heads = mixer.num_value_heads / tp
    row_bytes = task.number_bytes * task.tokens
    yield input_of("the joint projection", task, tokens=task.outer_tokens, width=task.hidden_size)
    yield Kept("joint projection", row_bytes * (2 * keys + 2 * values + 2 * heads))
    yield Kept("normed queries and keys", row_bytes * 2 * keys)
    if mixer.num_value_heads > mixer.num_key_heads:
        yield Kept("repeated queries and keys", row_bytes * 2 * heads * mixer.key_head_dim)
    yield Kept("values and gate", row_bytes * 2 * values)
    yield Kept("decays and strengths", (4 + task.number_bytes) * task.tokens * heads)
    yield Kept("pairs inside chunks", row_bytes * heads * _DELTA_CHUNK)
    yield Kept("output of attention, and normed", row_bytes * 2 * values)
    yield input_of("the output projection", task, tokens=task.tokens, width=values)


def _state_space_keeps(mixer: StateSpace, task: TaskOnRank) -> Iterator[Kept]:
    tp = task.sizes.tp
    inner = mixer.num_heads * mixer.head_dim / tp
    maps = 2 * mixer.num_groups * mixer.state_size / tp
    row_bytes = task.number_bytes * task.tokens
    yield input_of("the joint projection", task, tokens=task.outer_tokens, width=task.hidden_size)
    yield Kept("joint projection", row_bytes * (2 * inner + maps + mixer.num_heads / tp))
    yield Kept("output of the scan", row_bytes * inner)
    yield input_of("the output projection", task, tokens=task.tokens, width=inner)


def _mlp_keeps(mlp: Mlp, task: TaskOnRank) -> Iterator[Kept]:
    yield input_of("the MLP", task, tokens=task.outer_tokens, width=task.hidden_size)
    yield from _inner_mlp_keeps(mlp, task, tokens=task.tokens, tp=task.sizes.tp)


def _inner_mlp_keeps(mlp: Mlp, task: TaskOnRank, *, tokens: float, tp: int) -> Iterator[Kept]:
    made = mlp.ffn_hidden_size * (2 if mlp.gated else 1) / tp
    yield Kept("input of the activation function", task.number_bytes * tokens * made)
    yield input_of("the second map", task, tokens=tokens, width=mlp.ffn_hidden_size / tp)


def _experts_keep(mlp: Experts, task: TaskOnRank) -> Iterator[Kept]:
    """Yields what experts keep if every expert gets as many tokens."""
    outer, hidden = task.outer_tokens, task.hidden_size
    yield Kept("input of the router", task.number_bytes * outer * hidden, weights_only=True)
    yield from _routing_keeps(mlp, task)
    if mlp.shared_ffn_hidden_size:
        shared = Mlp(ffn_hidden_size=mlp.shared_ffn_hidden_size, gated=mlp.gated)
        yield from _inner_mlp_keeps(shared, task, tokens=task.tokens, tp=task.sizes.tp)
    size = mlp.latent_size or hidden
    sent = task.sent_tokens(mlp)
    yield input_of("the experts", task, tokens=sent, width=size)
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
