"""What one rank computes in a part of a module: operations with their FLOPs and bytes."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from megatron_mosaic.cost.context import ContextTask
from megatron_mosaic.cost.sizes import ParallelSizes, TrainingSettings
from megatron_mosaic.model.layers import (
    Experts,
    LatentAttention,
    Layer,
    LinearAttention,
    Mlp,
    SelfAttention,
    StateSpace,
)
from megatron_mosaic.model.spec import ModuleSpec, Precision

# Bytes that a value of 2 bytes costs when it is quantised for a multiplication: read to find its
# scale where that is one for the whole tensor, read, written, and written transposed.
# Source: recipes of TransformerEngine 2: current scaling, MXFP8 and NVFP4 (values of half a byte).
CAST_BYTES = {"fp8": 2 + 2 + 1 + 1, "mxfp8": 2 + 1 + 1, "nvfp4": 2 + 2 + 0.5 + 0.5}

# FLOPs of a flash attention's backward pass over its forward's: five multiplications for two.
# Source: Dao, arXiv 2307.08691, section 3.1.
FLASH_BACKWARD = 2.5

# Tokens that a scan of Mamba-2 or of a gated delta rule handles at once.
# Source: chunk sizes in Megatron-LM core_v0.19.0: MambaMixer's, and the delta rule's kernel's.
_MAMBA_CHUNK = 128
_DELTA_CHUNK = 64


class Operation(NamedTuple):
    """One kernel, or several alike.

    Args:
        curve: What kind it is: the name of its efficiency curve without the precision.
        precision: Of its multiplications.
        flops: Of the forward pass.
        backward_flops: Of the gradient of its input.
        forward_bytes: What the forward pass reads and writes.
        backward_bytes: What the gradient of its input reads and writes.
        weights: Weights that it multiplies with, on this rank.
        smallest: Smallest size of its multiplication.
        core: Whether selective recomputation runs it again.
    """

    curve: str
    precision: Precision = "bf16"
    flops: float = 0.0
    backward_flops: float = 0.0
    forward_bytes: float = 0.0
    backward_bytes: float = 0.0
    weights: float = 0.0
    smallest: float = 0.0
    core: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskTokens:
    """What a task brings to one context-parallel rank.

    Args:
        tokens: Tokens.
        pairs: Pairs of tokens of which one sees the other.
        all_pairs: Pairs of tokens of the same item, seen or not.
        context: What the rank has to do under a multimodal mask; ``None`` without one.
    """

    tokens: float
    pairs: float
    all_pairs: float
    context: ContextTask | None = None

    @classmethod
    def of(
        cls,
        module: ModuleSpec,
        *,
        samples: float,
        cp: int = 1,
        context: ContextTask | None = None,
    ) -> "TaskTokens":
        """Tokens of a task of some samples, with the module's own mask.

        Args:
            module: The module.
            samples: Samples of the task.
            cp: Ranks that share every sequence.
            context: Their loads under a multimodal mask.
        """
        if context is not None:
            return cls(
                tokens=context.tokens,
                pairs=context.pairs,
                all_pairs=context.all_pairs,
                context=context,
            )
        squares = module.items_per_sample.mean * module.tokens_per_item.mean_square
        share = samples / cp
        return cls(
            tokens=module.tokens_per_sample * share,
            pairs=module.pairs_per_sample * share,
            all_pairs=squares * share,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Workplace:
    """What the operations of a module's parts have in common.

    Args:
        hidden_size: Size of a token.
        task: Tokens of the task.
        sizes: How the module is split.
        settings: What the run does for all modules.
        precision: Of the multiplications inside layers.
    """

    hidden_size: int
    task: TaskTokens
    sizes: ParallelSizes
    settings: TrainingSettings
    precision: Precision

    @property
    def own_tokens(self) -> float:
        """Tokens of this rank outside of tensor-parallel regions."""
        sizes = self.sizes
        return self.task.tokens / (sizes.tp if sizes.sequence_parallel else 1)

    def matmul(
        self,
        size_in: float,
        size_out: float,
        *,
        rows: float | None = None,
        experts: int = 0,
        precision: Precision | None = None,
    ) -> Iterator[Operation]:
        """A multiplication of tokens with weights, and the casts that its precision needs.

        Args:
            size_in: Values of a token before it.
            size_out: Values after it.
            rows: Tokens; those of the task if absent.
            experts: Experts with weights of their own that share the rows; 0 is none.
            precision: Of the multiplication; the workplace's if absent.
        """
        rows = self.task.tokens if rows is None else rows
        precision = precision or self.precision
        weights = size_in * size_out * max(experts, 1)
        flops = 2 * rows * size_in * size_out
        moved = 2 * (rows * (size_in + size_out) + weights)
        yield Operation(
            curve="grouped_matmul" if experts else "matmul",
            precision=precision,
            flops=flops,
            backward_flops=flops,
            forward_bytes=moved,
            backward_bytes=moved,
            weights=weights,
            smallest=min(rows / max(experts, 1), size_in, size_out),
        )
        if cast := CAST_BYTES.get(precision):
            yield pointwise(rows * size_in * cast, rows * size_out * cast)


def pointwise(forward_bytes: float, backward_bytes: float) -> Operation:
    """An operation that memory bounds."""
    return Operation("elementwise", forward_bytes=forward_bytes, backward_bytes=backward_bytes)


def layer_operations(layer: Layer, place: Workplace) -> tuple[Operation, ...]:
    """Lists what one layer computes on one rank for one task."""
    return (*mixer_operations(layer, place), *mlp_operations(layer, place))


def mixer_operations(layer: Layer, place: Workplace) -> tuple[Operation, ...]:
    """Lists what a layer computes before its MLP."""
    match layer.mixer:
        case None:
            return ()
        case SelfAttention() as mixer:
            inner = _self_attention(mixer, place)
        case LatentAttention() as mixer:
            inner = _latent_attention(mixer, place)
        case LinearAttention() as mixer:
            inner = _linear_attention(mixer, place)
        case StateSpace() as mixer:
            inner = _state_space(mixer, place)
    return (*inner, *_around(place))


def mlp_operations(layer: Layer, place: Workplace) -> tuple[Operation, ...]:
    """Lists what a layer computes after its mixer."""
    match layer.mlp:
        case None:
            return ()
        case Mlp() as mlp:
            return (*_mlp(mlp, place), *_around(place))
        case Experts() as experts:
            return (*_experts(experts, place), *_around(place))


def _around(place: Workplace) -> Iterator[Operation]:
    # Norm before, residual after. Bytes of a value: norm reads and writes (2 + 2), backward reads
    # two and writes one (6); adding reads two and writes one (6), and so does its gradient.
    values = place.own_tokens * place.hidden_size
    yield pointwise(4 * values, 6 * values)
    dropped = 1 if place.settings.dropout else 0
    yield pointwise((6 + dropped) * values, (6 + 4 * dropped + dropped) * values)


def _self_attention(mixer: SelfAttention, place: Workplace) -> Iterator[Operation]:
    tp, tokens, hidden = place.sizes.tp, place.task.tokens, place.hidden_size
    queries = mixer.num_heads * mixer.head_dim / tp
    keys = max(mixer.num_query_groups / tp, 1) * mixer.head_dim
    gate = queries if mixer.output_gate else 0
    yield from place.matmul(hidden, queries + 2 * keys + gate)
    yield pointwise(4 * tokens * (queries + keys), 4 * tokens * (queries + keys))  # rotary
    if mixer.qk_norm:
        yield pointwise(4 * tokens * (queries + keys), 6 * tokens * (queries + keys))
    pairs = place.task.pairs
    if mixer.window is not None:
        pairs = min(pairs, tokens * mixer.window)
    yield from _attention(
        place,
        heads=mixer.num_heads / tp,
        pairs=pairs,
        key_dim=mixer.head_dim,
        value_dim=mixer.head_dim,
        bytes_per_token=2 * (2 * queries + 2 * keys),
    )
    if place.sizes.cp > 1 and (place.task.context or place.settings.cp_comm == "p2p"):
        # Each step of the ring but the first rescales what came out so far, in fp32, and adds;
        # under a multimodal mask there is a step of own keys, and one of those of others.
        steps = 1 if place.task.context else place.sizes.cp - 1
        yield pointwise(10 * steps * tokens * queries, 10 * steps * tokens * (queries + 2 * keys))
    if gate:
        yield pointwise(6 * tokens * gate, 10 * tokens * gate)
    yield from place.matmul(queries, hidden)


def _attention(
    place: Workplace,
    *,
    heads: float,
    pairs: float,
    key_dim: int,
    value_dim: int,
    bytes_per_token: float,
    curve: str = "attention",
) -> Iterator[Operation]:
    if place.settings.flash_attention:
        flops = 2 * pairs * heads * (key_dim + value_dim)
        moved = place.task.tokens * bytes_per_token
        yield Operation(
            curve,
            precision="fp8" if place.settings.fp8_attention else "bf16",
            flops=flops,
            backward_flops=FLASH_BACKWARD * flops,
            forward_bytes=moved,
            backward_bytes=2 * moved,
            smallest=min(key_dim, value_dim),
            core=True,
        )
        return
    # Written scores: two batched multiplications over all pairs, a masked softmax (reads, writes),
    # and dropout (reads, writes, and writes a mask of one byte).
    scores = place.task.all_pairs * heads
    flops = 2 * scores * (key_dim + value_dim)
    yield Operation(
        "matmul",
        flops=flops,
        backward_flops=2 * flops,
        forward_bytes=4 * scores,
        backward_bytes=8 * scores,
        smallest=min(key_dim, value_dim),
        core=True,
    )
    yield pointwise(4 * scores, 6 * scores)._replace(core=True)
    if place.settings.dropout:
        yield pointwise(5 * scores, 5 * scores)._replace(core=True)


def _latent_attention(mixer: LatentAttention, place: Workplace) -> Iterator[Operation]:
    tp, tokens, hidden = place.sizes.tp, place.task.tokens, place.hidden_size
    heads, query_dim = mixer.num_heads / tp, mixer.head_dim + mixer.rotary_head_dim
    if mixer.query_rank is None:
        yield from place.matmul(hidden, heads * query_dim)
    else:
        # The maps into latents are not split over tensor-parallel ranks, but over their tokens.
        yield from place.matmul(hidden, mixer.query_rank, rows=place.own_tokens)
        yield pointwise(4 * tokens * mixer.query_rank, 6 * tokens * mixer.query_rank)
        yield from place.matmul(mixer.query_rank, heads * query_dim)
    latent = mixer.key_value_rank + mixer.rotary_head_dim
    yield from place.matmul(hidden, latent, rows=place.own_tokens)
    yield pointwise(4 * tokens * latent, 6 * tokens * latent)
    made = heads * (mixer.head_dim + mixer.value_head_dim)
    yield from place.matmul(mixer.key_value_rank, made)
    # Rotary parts are turned and joined with the rest: queries and keys are written anew.
    joined = 2 * heads * query_dim
    yield pointwise(4 * tokens * joined, 4 * tokens * joined)
    yield from _attention(
        place,
        heads=heads,
        pairs=place.task.pairs,
        key_dim=query_dim,
        value_dim=mixer.value_head_dim,
        bytes_per_token=2 * heads * (2 * query_dim + 2 * mixer.value_head_dim),
        curve="latent_attention",
    )
    yield from place.matmul(heads * mixer.value_head_dim, hidden)


def _linear_attention(mixer: LinearAttention, place: Workplace) -> Iterator[Operation]:
    tp, tokens, hidden = place.sizes.tp, place.task.tokens, place.hidden_size
    keys = mixer.num_key_heads * mixer.key_head_dim / tp
    values = mixer.num_value_heads * mixer.value_head_dim / tp
    yield from place.matmul(hidden, 2 * keys + 2 * values + 2 * mixer.num_value_heads / tp)
    mixed = 2 * keys + values
    yield pointwise(4 * tokens * mixed, 10 * tokens * mixed)  # short convolution
    # Inside a chunk: keys with keys, the triangular inverse, queries with keys and with values;
    # between chunks: the state read and written.
    heads = mixer.num_value_heads / tp
    inside = _DELTA_CHUNK * (3 * mixer.key_head_dim + 2 * mixer.value_head_dim)
    state = 4 * mixer.key_head_dim * mixer.value_head_dim
    flops = tokens * heads * (inside + state)
    moved = tokens * 2 * (3 * mixed + values)
    yield Operation(
        "recurrence", flops=flops, backward_flops=2.5 * flops,
        forward_bytes=moved, backward_bytes=2.5 * moved,
    )  # fmt: skip
    yield pointwise(8 * tokens * values, 14 * tokens * values)  # gated norm
    yield from place.matmul(values, hidden)


def _state_space(mixer: StateSpace, place: Workplace) -> Iterator[Operation]:
    tp, tokens, hidden = place.sizes.tp, place.task.tokens, place.hidden_size
    inner = mixer.num_heads * mixer.head_dim / tp
    maps = mixer.num_groups * mixer.state_size / tp
    yield from place.matmul(hidden, 2 * inner + 2 * maps + mixer.num_heads / tp)
    yield pointwise(4 * tokens * (inner + 2 * maps), 10 * tokens * (inner + 2 * maps))
    # Mamba-2, arXiv 2405.21060, section 6: inside a chunk maps with maps and scores with values,
    # between chunks the states made and read.
    inside = _MAMBA_CHUNK * (maps + inner)
    states = 4 * inner * mixer.state_size
    flops = tokens * (inside + states)
    moved = tokens * 2 * (3 * inner + 4 * maps)
    yield Operation(
        "recurrence", flops=flops, backward_flops=2.5 * flops,
        forward_bytes=moved, backward_bytes=2.5 * moved,
    )  # fmt: skip
    yield pointwise(8 * tokens * inner, 14 * tokens * inner)  # gated norm
    yield from place.matmul(inner, hidden)


def _activation(rows: float, size: float, *, gated: bool) -> Operation:
    # Gated: reads two, writes one; backward reads three, writes two. Plain: reads and writes one.
    values = rows * size
    return pointwise(6 * values, 10 * values) if gated else pointwise(4 * values, 6 * values)


def _mlp(mlp: Mlp, place: Workplace, *, ffn: float | None = None) -> Iterator[Operation]:
    size = (ffn or mlp.ffn_hidden_size) / place.sizes.tp
    yield from place.matmul(place.hidden_size, size * (2 if mlp.gated else 1))
    yield _activation(place.task.tokens, size, gated=mlp.gated)
    yield from place.matmul(size, place.hidden_size)


def _experts(mlp: Experts, place: Workplace) -> Iterator[Operation]:
    sizes, hidden = place.sizes, place.hidden_size
    own = place.own_tokens
    # The router works in fp32: reads tokens, writes and reads scores a few times.
    yield pointwise(own * (4 * hidden + 24 * mlp.num_experts), own * (6 * hidden))
    size = mlp.latent_size or hidden
    if mlp.latent_size:
        yield from place.matmul(hidden, size, rows=own)
        yield from place.matmul(size, hidden, rows=own)
    rows = own * mlp.experts_per_token * sizes.etp
    # Sorted by expert before they are sent and once more where they arrive, and back: read, write.
    passes = 4 if place.settings.moe_dispatcher == "alltoall" and sizes.ep > 1 else 2
    yield Operation(
        "permute", forward_bytes=4 * passes * rows * size, backward_bytes=4 * passes * rows * size
    )
    local = mlp.num_experts // sizes.ep
    ffn = mlp.ffn_hidden_size / sizes.etp
    yield from place.matmul(size, ffn * (2 if mlp.gated else 1), rows=rows, experts=local)
    yield _activation(rows, ffn, gated=mlp.gated)
    yield from place.matmul(ffn, size, rows=rows, experts=local)
    if mlp.bias:
        # Whole-iteration graphs come with kernels that add it. TEGroupedMLP._apply_bias multiplies
        # it with probabilities in fp32, adds, joins the experts' parts, and goes back to 2 bytes.
        fused = place.settings.cuda_graph == "full"
        yield pointwise((4 if fused else 28) * rows * size, (2 if fused else 24) * rows * size)
    if mlp.shared_ffn_hidden_size:
        shared = Mlp(ffn_hidden_size=mlp.shared_ffn_hidden_size, gated=mlp.gated)
        yield from _mlp(shared, place)
