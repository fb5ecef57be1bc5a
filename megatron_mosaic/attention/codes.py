"""The rule of a mask as tensors, token by token, for kernels."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from megatron_mosaic.tokens.held import Held
from megatron_mosaic.tokens.mask import NO_DOCUMENT, NO_GROUP, SequenceMask, TokenCodes
from megatron_mosaic.tokens.ranges import Integers

_NO_QUERY, _NO_KEY = -1, -2  # unlike, so that two tokens without a group are not together
_INT32_CLASSES = 31


class SlotCodes(NamedTuple):
    """What decides who sees whom, slot by slot; tensors ``[b, slots]`` or what indexes them.

    Attributes:
        position: In the sequence.
        document: Number of the document; that of padding differs between queries and keys.
        group: Number of document and group together; where there is none, it differs as well.
        classes: Classes that a query sees, or as which a key is seen.
    """

    position: torch.Tensor
    document: torch.Tensor
    group: torch.Tensor
    classes: torch.Tensor

    def select(self, slots: slice) -> "SlotCodes":
        """Some of the slots of every sample."""
        return SlotCodes(*(each[:, slots] for each in self))


def visible(query: SlotCodes, key: SlotCodes) -> torch.Tensor:
    """Whether queries see keys, for tensors that broadcast; the rule of ``tokens.mask.visible``."""
    causal = (query.position >= key.position) & ((query.classes & key.classes) != 0)
    return (query.group == key.group) | ((query.document == key.document) & causal)


def slot_codes(
    masks: Sequence[SequenceMask],
    *,
    queries: Sequence[Held],
    query_slots: int,
    keys: Sequence[Held],
    key_slots: int,
    device: torch.device,
) -> tuple[SlotCodes, SlotCodes]:
    """Codes of queries and of keys.

    Args:
        masks: One for each sample.
        queries: Positions in the first slots of each sample; the slots behind them are padding.
        query_slots: Slots.
        keys: As of the queries.
        key_slots: Ditto.
        device: Where the codes go.
    """
    of_queries, of_keys = [], []
    for mask, query, key in zip(_compact(masks), queries, keys, strict=True):
        of_queries.append(_of_slots(mask, query, query_slots))
        of_keys.append(_of_slots(mask, key, key_slots))
    return (
        _tensors(of_queries, [codes.sees for codes in of_queries], _NO_QUERY, device),
        _tensors(of_keys, [codes.shown for codes in of_keys], _NO_KEY, device),
    )


def _compact(masks: Sequence[SequenceMask]) -> list[SequenceMask]:
    """The same masks with numbers as small as can be: kernels read them for every pair."""
    classes = 0
    for mask in masks:
        classes |= int(np.bitwise_or.reduce(mask.shown, initial=0))
    bits = [bit for bit in range(classes.bit_length()) if classes >> bit & 1]
    return [_renumbered(mask, bits) for mask in masks]


def _renumbered(mask: SequenceMask, bits: Sequence[int]) -> SequenceMask:
    real = mask.document != NO_DOCUMENT
    _, document = np.unique(mask.document, return_inverse=True)
    stride = int(mask.group.max(initial=0)) + 1
    _, group = np.unique(document * stride + mask.group, return_inverse=True)
    shown, sees = np.zeros_like(mask.shown), np.zeros_like(mask.sees)
    for place, bit in enumerate(bits):
        shown |= (mask.shown >> bit & 1) << place
        sees |= (mask.sees >> bit & 1) << place
    return SequenceMask(
        stops=mask.stops,
        document=np.where(real, document, NO_DOCUMENT),
        group=np.where(real & (mask.group != NO_GROUP), group, NO_GROUP),
        shown=shown,
        sees=sees,
    )


def _of_slots(mask: SequenceMask, held: Held, slots: int) -> TokenCodes:
    positions = np.full(slots, -1, dtype=np.int64)
    positions[: held.size] = held.position(np.arange(held.size))
    return mask.of_tokens(positions)


def _tensors(
    samples: Sequence[TokenCodes], classes: Sequence[Integers], nobody: int, device: torch.device
) -> SlotCodes:
    """Codes of a batch; ``nobody`` is the document and the group of tokens that have none."""
    position = np.stack([codes.position for codes in samples])
    document = np.stack([np.where(c.document < 0, nobody, c.document) for c in samples])
    group = np.stack([np.where(c.group < 0, nobody, c.group) for c in samples])
    shown = np.stack(classes)
    small = [position, document, group]
    narrow = shown.max(initial=0) < 1 << _INT32_CLASSES
    tensors = [torch.from_numpy(each.astype(np.int32)) for each in small]
    tensors.append(torch.from_numpy(shown.astype(np.int32 if narrow else np.int64)))
    return SlotCodes(*(each.to(device) for each in tensors))
