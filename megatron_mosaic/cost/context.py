"""What context-parallel ranks compute and receive of sequences under a multimodal mask."""

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from megatron_mosaic.model.workload import Workload, draw_masks
from megatron_mosaic.tokens.assign import assign
from megatron_mosaic.tokens.assignment import TokenAssignment
from megatron_mosaic.tokens.held import whole
from megatron_mosaic.tokens.mask import SequenceMask
from megatron_mosaic.tokens.names import Method
from megatron_mosaic.tokens.tiles import KERNEL_TILE, needed, tile_counts
from megatron_mosaic.tokens.visible import VisibleKeys

NUM_SEQUENCES = 8
"""Sequences that are drawn: as many as samples of the largest microbatch that is searched."""

NUM_EXCHANGED = 4
"""Sequences of which it is counted which keys are a rank's own, and which it receives: that takes
longer to count, and differs less."""

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, eq=False)
class ContextLoads:
    """Loads of the ranks of a group, for each of the sequences that are drawn.

    Args:
        pairs: Pairs of a query and a key in the tiles that a rank computes ``[sequences, cp]``.
        slots: Tokens that every rank's tensors have room for ``[sequences]``.
        lengths: Tokens ``[sequences]``.
        received: Keys that others hold and queries of a rank see, of the rank that receives
            most of a sequence, on average.
        own_share: Share of a rank's tiles whose keys it holds, on average.
    """

    pairs: Floats
    slots: Floats
    lengths: Floats
    received: float
    own_share: float

    @property
    def imbalance(self) -> float:
        """Tiles of the slowest rank over the mean of all, on average over sequences."""
        return float((self.pairs.max(axis=1) / self.pairs.mean(axis=1)).mean())

    def of_microbatch(self, samples: int) -> "ContextTask":
        """Loads of a task, on average over microbatches of consecutive sequences.

        Args:
            samples: Samples of the task.
        """
        index = np.arange(-(-len(self.pairs) // samples) * samples) % len(self.pairs)
        groups = index.reshape(-1, samples)
        pairs = self.pairs[groups].sum(axis=1)
        return ContextTask(
            pairs=float(pairs.max(axis=1).mean()),
            mean_pairs=float(pairs.mean()),
            tokens=float(self.slots[groups].sum(axis=1).mean()),
            length=float(self.lengths[groups].sum(axis=1).mean()),
            all_pairs=float((self.slots * self.lengths)[groups].sum(axis=1).mean()),
            received=samples * self.received,
            own_share=self.own_share,
        )


class ContextTask(NamedTuple):
    """What a task brings to a context-parallel rank.

    Attributes:
        pairs: Pairs in the tiles of the slowest rank.
        mean_pairs: Pairs in the tiles of a rank, on average.
        tokens: Tokens that its tensors have room for.
        length: Tokens of all ranks.
        all_pairs: Pairs of tokens of a sequence of which the rank has the query.
        received: Keys that the rank receives that receives most.
        own_share: Share of a rank's tiles whose keys it holds.
    """

    pairs: float
    mean_pairs: float
    tokens: float
    length: float
    all_pairs: float
    received: float
    own_share: float

    @property
    def wait_share(self) -> float:
        """Share of the slowest rank's attention in which a mean rank waits for it."""
        return 1 - self.mean_pairs / self.pairs if self.pairs else 0.0


@lru_cache(maxsize=128)
def context_loads(workload: Workload, *, cp: int, method: Method) -> ContextLoads:
    """Assigns drawn sequences to ranks and counts what each of these has to do.

    Args:
        workload: What sequences are drawn from.
        cp: Ranks of the group.
        method: How tokens are assigned.
    """
    sequences = [_Assigned.of(each, cp=cp, method=method) for each in _sequences(workload)]
    exchanged = sequences[:NUM_EXCHANGED]
    return ContextLoads(
        pairs=np.stack([each.pairs() for each in sequences]),
        slots=np.array([each.assignment.local_length() for each in sequences], dtype=np.float64),
        lengths=np.array([each.mask.length for each in sequences], dtype=np.float64),
        received=float(np.mean([each.most_received() for each in exchanged])),
        own_share=float(np.mean([each.own_share() for each in exchanged])),
    )


class _Sequence(NamedTuple):
    """A sequence that was drawn."""

    mask: SequenceMask
    visible: VisibleKeys


@lru_cache(maxsize=8)
def _sequences(workload: Workload) -> tuple[_Sequence, ...]:
    masks = draw_masks(workload, count=NUM_SEQUENCES)
    return tuple(_Sequence(mask, VisibleKeys.of(mask)) for mask in masks)


class _Assigned(NamedTuple):
    """A sequence whose tokens are assigned to ranks."""

    mask: SequenceMask
    visible: VisibleKeys
    assignment: TokenAssignment

    @classmethod
    def of(cls, sequence: _Sequence, *, cp: int, method: Method) -> Self:
        return cls(*sequence, assign(sequence.mask, cp=cp, method=method, tile=KERNEL_TILE))

    def pairs(self) -> Floats:
        return rank_pairs(self.mask, self.assignment, visible=self.visible)

    def most_received(self) -> int:
        """Keys of others in pieces that some query sees, of the rank that receives most."""
        cut, owner = self.assignment.cut, self.assignment.owner
        most = 0
        for rank in range(cut.cp):
            queries = self.assignment.held(rank)
            seen = needed(self.mask, edges=cut.edges, queries=queries, visible=self.visible)
            most = max(most, int(cut.sizes[seen & (owner != rank)].sum()))
        return most

    def own_share(self) -> float:
        """Share of tiles whose keys their rank holds, over all ranks."""
        tiles = {True: 0, False: 0}
        for rank in range(self.assignment.cut.cp):
            held = self.assignment.held(rank)
            edges = np.append(np.arange(0, held.size, KERNEL_TILE.queries), held.size)
            for own, keys in ((True, held), (False, whole(self.mask.length))):
                counts = tile_counts(
                    self.mask,
                    edges=edges,
                    tile_keys=KERNEL_TILE.keys,
                    queries=held,
                    keys=keys,
                    visible=self.visible,
                )
                tiles[own] += int(counts.sum())
        return tiles[True] / tiles[False] if tiles[False] else 1.0


def rank_pairs(
    mask: SequenceMask, assignment: TokenAssignment, *, visible: VisibleKeys | None = None
) -> Floats:
    """Counts pairs of a query and a key in the tiles of each rank, whose rows are its pieces.

    Args:
        mask: Mask of the sequence.
        assignment: Who keeps which tokens.
        visible: ``VisibleKeys.of(mask)``, if it is known.
    """
    cut = assignment.cut
    tiles = tile_counts(mask, edges=cut.edges, tile_keys=KERNEL_TILE.keys, visible=visible)
    pairs = tiles * KERNEL_TILE.keys * cut.sizes
    return np.bincount(assignment.owner, weights=pairs, minlength=cut.cp)
