"""What the backward pass of a layer holds for a moment, beside what it had kept."""

from megatron_mosaic.cost.activations import layer_keeps
from megatron_mosaic.cost.kept import TaskOnRank, total_bytes
from megatron_mosaic.model.layers import Experts, LatentAttention, Layer, Mlp, SelfAttention


def layer_working_bytes(layer: Layer, task: TaskOnRank) -> float:
    """Computes the gradients that live at once in a layer's backward pass, at most.

    The pass begins in the feed-forward part, when all activations are still there: the gradient
    of the layer's output, and that of the activation function's input. A recomputed layer has
    its activations beside them.
    """
    outer = task.number_bytes * task.outer_tokens * task.hidden_size
    held = outer + _feed_forward_bytes(layer, task)
    if task.sizes.recompute == "full":
        held += total_bytes(layer_keeps(layer, task))
    elif task.sizes.recompute == "selective":
        whole = total_bytes(layer_keeps(layer, task))
        held += whole - total_bytes(layer_keeps(layer, task, recompute="selective"))
    return held


def _feed_forward_bytes(layer: Layer, task: TaskOnRank) -> float:
    sizes = task.sizes
    row_bytes = task.number_bytes * task.tokens
    gathered = row_bytes * task.hidden_size if sizes.sequence_parallel else 0.0
    match layer.mlp:
        case Mlp() as mlp:
            ffn = row_bytes * mlp.ffn_hidden_size / sizes.tp
            return max(gathered + ffn, ffn * (2 if mlp.gated else 1))
        case Experts() as experts:
            sent = task.number_bytes * task.sent_tokens(experts)
            ffn = sent * experts.ffn_hidden_size / sizes.etp
            size = sent * (experts.latent_size or task.hidden_size)
            return max(2 * size, size + ffn, ffn * (2 if experts.gated else 1))
        case None:
            return row_bytes * task.hidden_size


def weight_shapes(layer: Layer, task: TaskOnRank) -> frozenset[tuple[int, int]]:
    """Lists the different shapes of a layer's weights on a rank, as rows and columns.

    Transformer Engine accumulates gradients of weights in Megatron's buffers, and hands autograd
    a placeholder of the weight's shape instead, one for each shape, that stays.

    Source:
        Transformer Engine 2.3 and later, ``get_dummy_wgrad`` in pytorch/module/base.py.
    """
    if task.kernels != "flash":
        return frozenset()
    hidden, tp, etp = task.hidden_size, task.sizes.tp, task.sizes.etp
    shapes: set[tuple[int, int]] = set()
    match layer.mixer:
        case SelfAttention() as mixer:
            queries = mixer.num_heads * mixer.head_dim
            made = queries + 2 * mixer.num_query_groups * mixer.head_dim
            made += queries if mixer.output_gate else 0
            shapes |= {(made // tp, hidden), (hidden, queries // tp)}
        case LatentAttention() as mixer:
            shapes |= _latent_shapes(mixer, hidden=hidden, tp=tp)
        case _:
            pass
    match layer.mlp:
        case Mlp(ffn_hidden_size=ffn, gated=gated):
            shapes |= _mlp_shapes(hidden, ffn, gated=gated, split=tp)
        case Experts() as experts:
            size = experts.latent_size or hidden
            shapes |= _mlp_shapes(size, experts.ffn_hidden_size, gated=experts.gated, split=etp)
            if shared := experts.shared_ffn_hidden_size:
                shapes |= _mlp_shapes(hidden, shared, gated=experts.gated, split=tp)
        case None:
            pass
    return frozenset(shapes)


def _mlp_shapes(hidden: int, ffn: int, *, gated: bool, split: int) -> set[tuple[int, int]]:
    return {(ffn * (2 if gated else 1) // split, hidden), (hidden, ffn // split)}


def _latent_shapes(mixer: LatentAttention, *, hidden: int, tp: int) -> set[tuple[int, int]]:
    heads = mixer.num_heads // tp
    query_size = heads * (mixer.head_dim + mixer.rotary_head_dim)
    rank = mixer.key_value_rank
    shapes = {
        (rank + mixer.rotary_head_dim, hidden),
        (heads * (mixer.head_dim + mixer.value_head_dim), rank),
        (hidden, heads * mixer.value_head_dim),
    }
    if mixer.query_rank is None:
        return shapes | {(query_size, hidden)}
    return shapes | {(mixer.query_rank, hidden), (query_size, mixer.query_rank)}
