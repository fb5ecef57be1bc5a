"""Which tokens a rank of the language model has of every sample of a microbatch."""

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, Protocol

import numpy as np
import torch

from megatron_mosaic.host.groups import ModuleGroups
from megatron_mosaic.host.multimodal_attention import MaskedSequences
from megatron_mosaic.layout.attention import AttentionPlan
from megatron_mosaic.layout.ownership import Runs
from megatron_mosaic.layout.sharding import SequenceSharding
from megatron_mosaic.tokens.assign import METHODS
from megatron_mosaic.tokens.assignment import SequenceCut, TokenAssignment
from megatron_mosaic.tokens.mask import NO_DOCUMENT, SequenceMask
from megatron_mosaic.tokens.presets import Item, preset_mask
from megatron_mosaic.tokens.ranges import Integers
from megatron_mosaic.tokens.tiles import tile_counts

NOBODY = -1  # the position of a slot without a token

# Microbatches whose tables are kept; they come back with every epoch, and in every stage at once.
_CACHED = 256


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
        attention: What the plan says.
        length: Tokens of every sequence.
        groups: Groups of the language model.
    """

    def __init__(self, attention: AttentionPlan, *, length: int, groups: ModuleGroups) -> None:
        placement, position = groups.placement, groups.position
        self.length = length
        self.splits_tp = placement.sequence_parallel
        self.attention = attention
        self._cp = placement.context_parallel_size
        self._tp = placement.tensor_model_parallel_size if self.splits_tp else 1
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
        assignments = [self._assignment(sample) for sample in samples]
        cp, tp = self._place
        num_slots = max(each.local_length(multiple=self._tp) for each in assignments)
        context = np.full((len(samples), num_slots), NOBODY)
        for row, assignment in zip(context, assignments, strict=True):
            held = assignment.held(cp)
            row[: held.size] = held.position(np.arange(held.size))
        share = num_slots // self._tp
        return LocalTokens(own=context[:, tp * share : (tp + 1) * share], context=context)

    def _make_sequences(
        self, samples: tuple[SampleSequence, ...], device: torch.device
    ) -> MaskedSequences:
        masks = [self._mask(sample) for sample in samples]
        context = self.tokens(samples).context
        rotary = np.zeros_like(context)
        for row, positions, mask in zip(rotary, context, masks, strict=True):
            own = positions != NOBODY
            row[own] = document_positions(mask)[positions[own]]
        assignments = [self._assignment(sample) for sample in samples]
        return MaskedSequences(
            masks=tuple(masks),
            assignments=tuple(assignments) if self._cp > 1 else None,
            rotary_positions=to_device(rotary.T, device),
            num_positions=self.length,
        )

    def _mask(self, sample: SampleSequence) -> SequenceMask:
        return sample_mask(self.attention, sample, length=self.length)

    def _assignment(self, sample: SampleSequence) -> TokenAssignment:
        return sample_assignment(self.attention, sample, length=self.length, cp=self._cp)


def sample_mask(attention: AttentionPlan, sample: SampleSequence, *, length: int) -> SequenceMask:
    """Builds the mask of a sample."""
    return preset_mask(
        attention.mask,
        length=length,
        items=[Item(*run) for run in sample.images],
        document_stops=sample.document_stops,
    )


def sample_assignment(
    attention: AttentionPlan, sample: SampleSequence, *, length: int, cp: int
) -> TokenAssignment:
    cut = SequenceCut(length=length, cp=cp, block=max(1, length // (8 * cp)))
    mask = sample_mask(attention, sample, length=length)
    return METHODS[attention.tokens](cut, tile_counts(mask, edges=cut.edges, tile_keys=4))


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
