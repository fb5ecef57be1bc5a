"""Which tokens a rank of the language model has of every sample of a microbatch."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np
import torch

from megatron_mosaic.host.groups import ModuleGroups
from megatron_mosaic.host.multimodal_attention import MaskedSequences
from megatron_mosaic.host.rotary import Grid, document_positions, grid_positions
from megatron_mosaic.layout.sequences import MaskedSharding, SampleSequence
from megatron_mosaic.layout.sharding import SequenceSharding
from megatron_mosaic.tokens.mask import SequenceMask
from megatron_mosaic.tokens.ranges import Integers

NOBODY = -1  # the position of a slot without a token

# Microbatches whose tables are kept; they come back with every epoch, and in every stage at once.
_CACHED = 256


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

    splits_tp: bool
    """Whether tensor-parallel ranks have parts of their own."""

    @property
    def length(self) -> int:
        """Tokens of every sequence."""
        ...

    def tokens(self, samples: tuple[SampleSequence, ...]) -> LocalTokens:
        """Tells which tokens this rank has."""
        ...

    def sequences(
        self, samples: tuple[SampleSequence, ...], device: torch.device
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
        self.sharding = sharding
        self.length = sharding.sequence_length
        self.splits_tp = sharding.tp > 1
        parts = [
            np.fromiter(sharding.positions(cp=position.cp, tp=tp).numbers(), dtype=np.int64)
            for tp in range(sharding.tp)
        ]
        self._own = parts[position.tp if self.splits_tp else 0]
        self._context = np.concatenate(parts)

    def tokens(self, samples: tuple[SampleSequence, ...]) -> LocalTokens:
        """Tells which tokens this rank has."""
        return LocalTokens(
            own=np.tile(self._own, (len(samples), 1)),
            context=np.tile(self._context, (len(samples), 1)),
        )

    def sequences(self, samples: tuple[SampleSequence, ...], device: torch.device) -> None:
        """Returns None: attention knows the split, and its mask is causal."""
        return None


class MaskedParts:
    """Every sequence split by its own mask; without context parallelism only the mask matters.

    Args:
        sharding: How.
        groups: Groups of the language model.
        grid: Patches of an image, where rotary positions count their rows and columns (M-RoPE).
    """

    def __init__(
        self, sharding: MaskedSharding, groups: ModuleGroups, *, grid: Grid | None = None
    ) -> None:
        position = groups.position
        self.length = sharding.sequence_length
        self.splits_tp = sharding.tp > 1
        self.attention = sharding.attention
        self._sharding, self._grid = sharding, grid
        self._place = position.cp, position.tp if self.splits_tp else 0
        self._tokens = lru_cache(_CACHED)(self._find_tokens)
        self._sequences = lru_cache(_CACHED)(self._make_sequences)

    def tokens(self, samples: tuple[SampleSequence, ...]) -> LocalTokens:
        """Tells which tokens this rank has."""
        return self._tokens(samples)

    def sequences(
        self, samples: tuple[SampleSequence, ...], device: torch.device
    ) -> MaskedSequences:
        """Returns masks and assignments of the samples."""
        return self._sequences(samples, device)

    def _find_tokens(self, samples: tuple[SampleSequence, ...]) -> LocalTokens:
        cp, tp = self._place
        share = self._sharding.local_length(samples)
        context = np.full((len(samples), share * self._sharding.tp), NOBODY)
        for row, sample in zip(context, samples, strict=True):
            held = self._sharding.assignment(sample).held(cp)
            row[: held.size] = held.position(np.arange(held.size))
        return LocalTokens(own=context[:, tp * share : (tp + 1) * share], context=context)

    def _make_sequences(
        self, samples: tuple[SampleSequence, ...], device: torch.device
    ) -> MaskedSequences:
        masks = [self._sharding.mask(sample) for sample in samples]
        assignments = [self._sharding.assignment(sample) for sample in samples]
        context = self.tokens(samples).context
        rotary = [
            np.where(own != NOBODY, self._positions(mask, sample)[:, own], 0)
            for own, mask, sample in zip(context, masks, samples, strict=True)
        ]
        return MaskedSequences(
            masks=tuple(masks),
            assignments=tuple(assignments) if self._sharding.cp > 1 else None,
            rotary_positions=to_device(np.stack(rotary, axis=1), device),
            num_positions=self.length,
        )

    def _positions(self, mask: SequenceMask, sample: SampleSequence) -> Integers:
        """Rotary positions of all tokens of a sample, along each axis."""
        if self._grid is None:
            return document_positions(mask)[None]
        return grid_positions(mask, sample, grid=self._grid)


def to_device(table: Integers, device: torch.device) -> torch.Tensor:
    """Copies indices without waiting for the device."""
    host = torch.from_numpy(np.ascontiguousarray(table))
    return host if device.type == "cpu" else host.pin_memory().to(device, non_blocking=True)
