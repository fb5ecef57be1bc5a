"""What a module's input and output keep: embedding, projector, head and loss."""

from collections.abc import Iterator

from megatron_mosaic.cost.activations import layer_keeps
from megatron_mosaic.cost.kept import Kept, TaskOnRank, input_of, mask_bytes, norm_keeps
from megatron_mosaic.model.layers import LatentAttention, SelfAttention
from megatron_mosaic.model.parameters import VOCAB_MULTIPLE, padded_vocab_size
from megatron_mosaic.model.spec import LanguageHead, ModuleSpec, Patches, Projector, TokenEmbedding

_INDEX_BYTES = 8  # torch keeps indices as int64


def input_keeps(module: ModuleSpec, task: TaskOnRank) -> Iterator[Kept]:
    """Yields what the part before the layers keeps for its backward pass."""
    match module.input:
        case TokenEmbedding(num_positions=num_positions):
            yield Kept("token ids", _INDEX_BYTES * task.tokens, weights_only=True)
            if num_positions:
                yield Kept("positions", _INDEX_BYTES * task.longest, weights_only=True)
        case Patches() as patches:
            pieces = task.tokens * (1 - patches.extra_tokens / task.longest)
            size = task.number_bytes * pieces * patches.values
            yield Kept("pixels", size, weights_only=True)
            if patches.num_positions:
                yield Kept("positions", _INDEX_BYTES * task.longest, weights_only=True)
            if patches.normed:
                yield from norm_keeps(task, width=task.hidden_size, tokens=task.tokens)
        case None:
            return
    if task.dropout and isinstance(module.input, TokenEmbedding):
        size = mask_bytes(task) * task.outer_tokens * task.hidden_size
        yield Kept("mask of dropout", size)
    if task.rotary and (task.kernels != "local" or task.sizes.recompute == "full"):
        # All layers share them, so the input stands in for the layers; in torch's own layers
        # the tables that each makes of them stay instead.
        yield Kept("angles of rotation", 4 * task.longest * _rotated_size(module))


def _rotated_size(module: ModuleSpec) -> int:
    for _, layer in module.layers:
        match layer.mixer:
            case SelfAttention(head_dim=size) | LatentAttention(rotary_head_dim=size):
                return size
            case _:
                continue
    return 0


def input_closing_bytes(
    module: ModuleSpec, task: TaskOnRank, *, multiple: int = VOCAB_MULTIPLE
) -> float:
    """Computes the gradient of the input's table, which autograd makes before it is added up."""
    if not isinstance(module.input, TokenEmbedding):
        return 0.0
    rows = _rows_of_rank(module.input.vocab_size, task, multiple)
    return task.number_bytes * rows * task.hidden_size


def output_keeps(module: ModuleSpec, task: TaskOnRank) -> Iterator[Kept]:
    """Yields what the part after the layers keeps, without the loss."""
    if module.final_norm:
        yield from norm_keeps(task, width=task.hidden_size, tokens=task.outer_tokens)
    match module.output:
        case LanguageHead(mtp_layers=levels):
            inputs = input_of("the head", task, tokens=task.outer_tokens, width=task.hidden_size)
            yield inputs
            for _ in range(levels):
                yield from _mtp_keeps(module, task)
                yield inputs
        case Projector() as projector:
            yield from _projector_keeps(projector, task)
        case None:
            return


def _mtp_keeps(module: ModuleSpec, task: TaskOnRank) -> Iterator[Kept]:
    """Yields what one further prediction keeps, but for its head."""
    *_, last = (run.layer for run in module.layers)
    for _ in range(3):
        yield from norm_keeps(task, width=task.hidden_size, tokens=task.outer_tokens)
    yield input_of("the joining map", task, tokens=task.outer_tokens, width=2 * task.hidden_size)
    yield from layer_keeps(last, task, recompute=task.sizes.recompute)


def _projector_keeps(projector: Projector, task: TaskOnRank) -> Iterator[Kept]:
    rows = task.tokens / projector.merged_tokens
    maps = list(zip(projector.sizes, projector.sizes[1:], strict=False))
    for index, (width, made) in enumerate(maps):
        # Every second map reads what the one before has split over tensor-parallel ranks.
        split = task.sizes.tp if index % 2 else 1
        yield input_of("a map", task, tokens=rows, width=width / split)
        if index + 1 < len(maps):
            split = 1 if index % 2 else task.sizes.tp
            yield Kept("input of the activation function", task.number_bytes * rows * made / split)


def handed_bytes(module: ModuleSpec, task: TaskOnRank) -> float:
    """Computes the rows of a task that wait for the module that reads them.

    When it has read them their gradient takes their place, until this module's backward pass.
    """
    match module.output:
        case LanguageHead():
            return 0.0
        case Projector(sizes=sizes, merged_tokens=merged):
            return task.number_bytes * task.tokens / merged * sizes[-1]
        case None:
            return task.number_bytes * task.tokens * task.hidden_size


def loss_keeps(
    module: ModuleSpec, task: TaskOnRank, *, fused: bool, multiple: int = VOCAB_MULTIPLE
) -> Iterator[Kept]:
    """Yields what the loss keeps; it is gone when the last stage's backward pass has begun.

    Args:
        module: The module.
        task: Its task.
        fused: Whether one kernel computes the loss: it writes the gradient over the logits.
            Otherwise their softmax is kept in fp32.
        multiple: Number of which each rank's share of the vocabulary is a multiple.
    """
    if not isinstance(module.output, LanguageHead):
        return
    predictions = task.tokens * (1 + module.output.mtp_layers)
    logits = predictions * _rows_of_rank(module.output.vocab_size, task, multiple)
    if fused and task.kernels != "local":
        yield Kept("logits", task.number_bytes * logits)
        return
    yield Kept("softmax of the logits", 4 * logits)
    yield Kept("targets", (_INDEX_BYTES + 1) * predictions)


def loss_working_bytes(
    module: ModuleSpec, task: TaskOnRank, *, fused: bool, multiple: int = VOCAB_MULTIPLE
) -> float:
    """Computes what the loss and the head hold at most while their passes are under way.

    Source:
        Megatron-Core 0.19, tensor_parallel/layers.py: where the gradient of weights goes straight
        into its buffer, autograd gets an empty tensor of the weights' shape.
    """
    if not isinstance(module.output, LanguageHead):
        return 0.0
    vocabulary = _rows_of_rank(module.output.vocab_size, task, multiple)
    kept = sum(part.bytes for part in loss_keeps(module, task, fused=fused, multiple=multiple))
    if not fused:
        # The logits beside their softmax, forwards and, as gradients, backwards.
        kept += task.number_bytes * task.tokens * vocabulary
    # The gradient of the hidden states; with sequence parallelism before it is cut, and beside
    # the gathered hidden states.
    gathered = 2 if task.sizes.sequence_parallel else 1
    rows = gathered * task.tokens + vocabulary
    return kept + rows * task.number_bytes * task.hidden_size


def _rows_of_rank(vocab_size: int, task: TaskOnRank, multiple: int) -> float:
    return padded_vocab_size(vocab_size, tp=task.sizes.tp, multiple=multiple) / task.sizes.tp
