"""Which tokens a rank of the language model has of every sample of a microbatch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch

from megatron_mosaic.host.groups import ModuleGroups
from megatron_mosaic.host.multimodal_attention import MaskedSequences
from megatron_mosaic.layout.attention import AttentionPlan
from megatron_mosaic.layout.ownership import Runs
from megatron_mosaic.layout.sharding import SequenceSharding
from megatron_mosaic.tokens.mask import NO_DOCUMENT, SequenceMask
from megatron_mosaic.tokens.ranges import Integers

NOBODY = -1  # the position of a slot without a token


class SampleSequence(NamedTuple):
    """What decides where the tokens of a sample go.

    Attributes:
        images: Positions of its image rows.
        document_stops: Where its documents end; None where the plan asks for no mask.
    """

    images: Runs
    document_stops: tuple[int, ...] | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class LocalTokens:
    """Positions of the tokens in a rank's slots, ``NOBODY`` where there is none.

    Args:
        own: Those of this rank ``[b, slots]``.
        context: Those of all tensor-parallel ranks of its context-parallel place, of which its
            own are a part with sequence parallelism ``[b, slots * tp]``.
    """

    own: Integers
    context: Integers

    @property
    def num_slots(self) -> int:
        """Slots of this rank."""
        return self.own.shape[1]


class SequenceParts(Protocol):
    """A way to split the sequences of a microbatch over the ranks of a replica."""

    length: int
    """Tokens of every sequence."""

    splits_tp: bool
    """Whether tensor-parallel ranks have parts of their own."""

    def tokens(self, samples: Sequence[SampleSequence]) -> LocalTokens:
        """Tells which tokens this rank has."""
        ...

    def sequences(
        self, samples: Sequence[SampleSequence], device: torch.device
    ) -> MaskedSequences | None:
        """Returns what attention has to know of the samples; None if that is nothing."""
        ...


class ZigzagParts:
    """Every sequence split like any other, as Megatron does it.

    Args:
        sharding: How.
        groups: Groups of the language model.
    """

    def __init__(self, sharding: SequenceSharding, groups: ModuleGroups) -> None:
        position = groups.position
        self.length = sharding.sequence_length
        self.splits_tp = sharding.tp > 1
        parts = [
            np.fromiter(sharding.positions(cp=position.cp, tp=tp).numbers(), dtype=np.int64)
            for tp in range(sharding.tp)
        ]
        self._own = parts[position.tp if self.splits_tp else 0]
        self._context = np.concatenate(parts)

    def tokens(self, samples: Sequence[SampleSequence]) -> LocalTokens:
        """Tells which tokens this rank has."""
        return LocalTokens(
            own=np.tile(self._own, (len(samples), 1)),
            context=np.tile(self._context, (len(samples), 1)),
        )

    def sequences(self, samples: Sequence[SampleSequence], device: torch.device) -> None:
        """Returns None: attention knows the split, and its mask is causal."""
        return None


def document_positions(mask: SequenceMask) -> Integers:
    """Position of every token from the beginning of its document; 0 of padding.

    Megatron counts so in packed (``thd``) sequences.
    """
    begins = np.diff(mask.document, prepend=NO_DOCUMENT - 1) != 0
    first = mask.starts[np.flatnonzero(begins)][np.cumsum(begins) - 1]
    sizes = np.diff(mask.stops, prepend=0)
    positions = np.arange(mask.length) - np.repeat(first, sizes)
    return np.where(np.repeat(mask.document != NO_DOCUMENT, sizes), positions, 0)


def to_device(table: Integers, device: torch.device) -> torch.Tensor:
    """Copies indices without waiting for the device."""
    host = torch.from_numpy(np.ascontiguousarray(table))
    return host if device.type == "cpu" else host.pin_memory().to(device, non_blocking=True)
