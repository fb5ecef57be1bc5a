"""What one rank computes at the ends of a module: its first tokens, and its output."""

from collections.abc import Iterator

from megatron_mosaic.cost.operations import Operation, Workplace, layer_operations, pointwise
from megatron_mosaic.model.spec import (
    LanguageHead,
    ModuleSpec,
    Patches,
    Projector,
    TokenEmbedding,
)


def input_operations(module: ModuleSpec, place: Workplace) -> tuple[Operation, ...]:
    """Lists what makes a module's first tokens."""
    match module.input:
        case None:
            return ()
        case Patches(values=values):
            return tuple(place.matmul(values, place.hidden_size, rows=place.own_tokens))
        case TokenEmbedding():
            # A look-up reads and writes; its gradient is added in fp32.
            values = place.task.tokens * place.hidden_size
            return (pointwise(4 * values, 10 * values),)


def output_operations(module: ModuleSpec, place: Workplace) -> tuple[Operation, ...]:
    """Lists what becomes of a module's last tokens."""
    norm = place.own_tokens * place.hidden_size
    first = pointwise(4 * norm, 6 * norm)
    match module.output:
        case None:
            return (first,)
        case LanguageHead() as head:
            return (first, *_head(head, module, place))
        case Projector() as projector:
            return (first, *_projector(projector, place))


def _head(head: LanguageHead, module: ModuleSpec, place: Workplace) -> Iterator[Operation]:
    vocab = head.vocab_size / place.sizes.tp
    values = place.task.tokens * vocab
    # Fused: two passes read the logits, the second writes their gradient in place. Unfused: in
    # fp32, with maximum, exponential and sum, each a pass of its own.
    loss = (4, 4) if place.settings.cross_entropy_fusion else (26, 10)
    for _ in range(1 + head.mtp_layers):
        # Megatron leaves the logits in bf16 unless told otherwise.
        precision = place.precision if place.settings.fp8_output else "bf16"
        yield from place.matmul(place.hidden_size, vocab, precision=precision)
        yield pointwise(loss[0] * values, loss[1] * values)
    if head.mtp_layers:
        *_, last = module.each_layer()
        for _ in range(head.mtp_layers):
            rows = place.own_tokens
            yield from place.matmul(2 * place.hidden_size, place.hidden_size, rows=rows)
            yield from layer_operations(last, place)


def _projector(projector: Projector, place: Workplace) -> Iterator[Operation]:
    rows = place.task.tokens / projector.merged_tokens
    pairs = zip(projector.sizes, projector.sizes[1:], strict=False)
    for index, (before, after) in enumerate(pairs):
        tp = place.sizes.tp
        split = (before, after / tp) if index % 2 == 0 else (before / tp, after)
        yield from place.matmul(*split, rows=rows)
        yield pointwise(4 * rows * after / tp, 6 * rows * after / tp)
