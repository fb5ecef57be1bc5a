"""Sequences with a mask of their own: who keeps which tokens follows from what a batch says.

Every rank knows the facts of every sample a step ahead, so all of them find the same masks and
assignments without talking. Answers are kept, as a sample is asked for by routes, stages and
attention.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from megatron_mosaic.layout.attention import AttentionPlan
from megatron_mosaic.layout.placement import ModulePlacement
from megatron_mosaic.layout.rows import Interval, Rows
from megatron_mosaic.layout.shard_table import ShardTable
from megatron_mosaic.layout.sharding import SequenceSharding
from megatron_mosaic.tokens.assign import assign
from megatron_mosaic.tokens.assignment import TokenAssignment
from megatron_mosaic.tokens.mask import SequenceMask
from megatron_mosaic.tokens.presets import Item, preset_mask
from megatron_mosaic.tokens.ranges import Integers
from megatron_mosaic.tokens.tiles import KERNEL_TILE

# Samples whose masks and assignments are kept, 130 KB each at a million tokens, and those whose
# tables are: routes alone ask for them, and they have 2 MB.
_CACHED = 1024
_CACHED_TABLES = 128


class SampleSequence(NamedTuple):
    """What decides where the tokens of a sample go.

    Attributes:
        items: Positions of its items, such as images, ascending.
        document_stops: Where its documents end, and padding begins after the last one; None is
            one document without padding.
    """

    items: tuple[Interval, ...] = ()
    document_stops: tuple[int, ...] | None = None


@lru_cache(_CACHED)
def sample_mask(attention: AttentionPlan, sample: SampleSequence, *, length: int) -> SequenceMask:
    """Builds the mask of a sample.

    Args:
        attention: What the plan says.
        sample: What the batch says.
        length: Tokens of the sequence, padding included.

    Raises:
        LayoutError: The two contradict each other.
    """
    return preset_mask(
        attention.mask,
        length=length,
        items=[Item(*item) for item in sample.items],
        document_stops=sample.document_stops,
    )


@lru_cache(_CACHED)
def sample_assignment(
    attention: AttentionPlan, sample: SampleSequence, *, length: int, cp: int
) -> TokenAssignment:
    """Decides which context-parallel rank keeps which tokens of a sample.

    Args:
        attention: What the plan says.
        sample: What the batch says.
        length: Tokens of the sequence, padding included.
        cp: Context-parallel size.

    Raises:
        LayoutError: Plan and batch contradict each other.
    """
    mask = sample_mask(attention, sample, length=length)
    # On one rank there is nothing to choose: no tile need be counted.
    method = "contiguous" if cp == 1 else attention.tokens
    return assign(mask, cp=cp, method=method, tile=KERNEL_TILE)


@dataclass(frozen=True, kw_only=True)
class MaskedSharding:
    """Split of the language model's sequences by the mask of each.

    A context-parallel rank has its tokens in the order of the sequence, in the first of its slots,
    of which all ranks have as many for all samples of a microbatch: the others are padding that
    nobody sees. Sequence parallelism cuts the slots into ``tp`` consecutive parts.

    Args:
        attention: What the plan says.
        sequence_length: Tokens of every sequence, padding included.
        cp: Context-parallel size.
        tp: Tensor-parallel size with sequence parallelism, else 1.
    """

    # Seven positions, cp = 2, tp = 2, contiguous: 0-3 on cp 0, 4-6 on cp 1, four slots each.
    #
    # position     0   1   2   3   4   5   6   -
    # (cp, tp)    0,0 0,0 0,1 0,1 1,0 1,0 1,1 1,1

    attention: AttentionPlan
    sequence_length: int
    cp: int = 1
    tp: int = 1

    @classmethod
    def of(cls, placement: ModulePlacement, *, sequence_length: int) -> "MaskedSharding | None":
        """Returns how a placement splits sequences, or None if its plan names no mask."""
        if placement.attention is None:
            return None
        return cls(
            attention=placement.attention,
            sequence_length=sequence_length,
            cp=placement.context_parallel_size,
            tp=placement.tensor_model_parallel_size if placement.sequence_parallel else 1,
        )

    def mask(self, sample: SampleSequence) -> SequenceMask:
        """Mask of a sample.

        Raises:
            LayoutError: Plan and batch contradict each other.
        """
        return sample_mask(self.attention, sample, length=self.sequence_length)

    def assignment(self, sample: SampleSequence) -> TokenAssignment:
        """Context-parallel rank of every token of a sample.

        Raises:
            LayoutError: Plan and batch contradict each other.
        """
        return sample_assignment(self.attention, sample, length=self.sequence_length, cp=self.cp)

    def context_length(self, samples: Sequence[SampleSequence]) -> int:
        """Slots of every context-parallel rank, for the samples of a replica's microbatch.

        All ranks have those of the fullest one, as tensors of a microbatch have one shape.
        """
        return max(self.assignment(each).local_length(multiple=self.tp) for each in samples)

    def local_length(self, samples: Sequence[SampleSequence]) -> int:
        """Slots of every rank, for the samples of a replica's microbatch."""
        return self.context_length(samples) // self.tp

    def table(self, sample: SampleSequence, *, local_length: int) -> ShardTable:
        """Who keeps which positions of a sample.

        Args:
            sample: The sample.
            local_length: Slots of every rank in its microbatch.
        """
        return _table(self, sample, local_length)

    def positions(self, sample: SampleSequence, *, cp: int, tp: int, local_length: int) -> Rows:
        """Positions that a rank keeps of a sample, in the order in which it has them.

        Args:
            sample: The sample.
            cp: Context-parallel rank.
            tp: Tensor-parallel rank; 0 without sequence parallelism.
            local_length: Slots of every rank in its microbatch.
        """
        starts, stops, _ = self.table(sample, local_length=local_length).columns((cp, tp))
        return Rows.of_sorted(list(map(Interval, starts, stops)))


Sharding = SequenceSharding | MaskedSharding
"""How sequences are split: all alike, or each by its mask."""


def sharding_of(placement: ModulePlacement, *, sequence_length: int) -> Sharding | None:
    """Returns how a placement splits sequences, or None if every rank keeps them whole.

    Raises:
        LayoutError: The length cannot be split as Megatron does it.
    """
    by_mask = MaskedSharding.of(placement, sequence_length=sequence_length)
    return by_mask or SequenceSharding.of(placement, sequence_length=sequence_length)


@lru_cache(_CACHED_TABLES)
def _table(sharding: MaskedSharding, sample: SampleSequence, local_length: int) -> ShardTable:
    assignment = sharding.assignment(sample)
    starts, stops, owner = _stretches(assignment)
    places = _places(stops - starts, owner)
    # A stretch that reaches into several parts is cut where they begin.
    first, last = places // local_length, (places + stops - starts - 1) // local_length
    parts = last - first + 1
    stretch = np.repeat(np.arange(len(starts)), parts)
    tp = first[stretch] + np.arange(len(stretch)) - np.repeat(np.cumsum(parts) - parts, parts)
    moved = starts[stretch] - places[stretch]
    starts = np.maximum(starts[stretch], tp * local_length + moved)
    stops = np.minimum(stops[stretch], (tp + 1) * local_length + moved)
    return ShardTable(
        starts=starts.tolist(),
        stops=stops.tolist(),
        keys=list(zip(owner[stretch].tolist(), tp.tolist(), strict=True)),
    )


def _stretches(assignment: TokenAssignment) -> tuple[Integers, Integers, Integers]:
    """Positions that neighbouring pieces of one rank have together, and the rank; ascending."""
    edges, owner = assignment.cut.edges, assignment.owner
    begins = np.flatnonzero(np.diff(owner, prepend=-1))
    return edges[begins], edges[np.append(begins[1:], len(owner))], owner[begins]


def _places(sizes: Integers, owner: Integers) -> Integers:
    """Tokens that the rank of each stretch has before it."""
    order = np.argsort(owner, kind="stable")
    before = np.cumsum(sizes[order]) - sizes[order]
    begins = np.diff(owner[order], prepend=-1) != 0
    first = before[np.flatnonzero(begins)][np.cumsum(begins) - 1]
    places = np.empty_like(sizes)
    places[order] = before - first
    return places
