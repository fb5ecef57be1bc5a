"""What context-parallel ranks compute and receive of sequences under a multimodal mask."""

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_mosaic.model.workload import Workload, draw_masks
from megatron_mosaic.tokens.assign import assign
from megatron_mosaic.tokens.assignment import TokenAssignment
from megatron_mosaic.tokens.held import whole
from megatron_mosaic.tokens.mask import SequenceMask
from megatron_mosaic.tokens.names import Method
from megatron_mosaic.tokens.tiles import Tile, needed, tile_counts
from megatron_mosaic.tokens.visible import VisibleKeys

NUM_SEQUENCES = 16
"""Sequences that are drawn: microbatches of up to 8 samples have at least two unlike ones."""

TILE = Tile(128, 128)
"""Tile of the kernel. Source: torch 2.11, torch/nn/attention/flex_attention.py,
``_DEFAULT_SPARSE_BLOCK_SIZE``."""

NUM_OWN = 2
"""Sequences of which the share of tiles with own keys is counted: it hardly differs."""

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, eq=False)
class ContextLoads:
    """Loads of the ranks of a group, for each of the sequences that are drawn.

    Args:
        pairs: Pairs of a query and a key in the tiles that a rank computes ``[sequences, cp]``.
        slots: Tokens that every rank's tensors have room for ``[sequences]``.
        lengths: Tokens ``[sequences]``.
        received: Keys that a rank's queries see and others hold ``[sequences, cp]``.
        own_share: Share of a rank's tiles whose keys it holds, on average.
    """

    pairs: Floats
    slots: Floats
    lengths: Floats
    received: Floats
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
            received=float(self.received[groups].sum(axis=1).max(axis=1).mean()),
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
    rows = [
        _loads(mask, visible, cp=cp, method=method, count_own=number < NUM_OWN)
        for number, (mask, visible) in enumerate(_sequences(workload))
    ]
    own = [row.own_share for row in rows if row.own_share is not None]
    return ContextLoads(
        pairs=np.stack([row.pairs for row in rows]),
        slots=np.array([row.slots for row in rows]),
        lengths=np.array([row.length for row in rows]),
        received=np.stack([row.received for row in rows]),
        own_share=sum(own) / len(own),
    )


@lru_cache(maxsize=8)
def _sequences(workload: Workload) -> tuple[tuple[SequenceMask, VisibleKeys], ...]:
    masks = draw_masks(workload, count=NUM_SEQUENCES)
    return tuple((mask, VisibleKeys.of(mask)) for mask in masks)


class _Loads(NamedTuple):
    """Of one sequence."""

    pairs: Floats
    slots: float
    length: float
    received: Floats
    own_share: float | None


def _loads(
    mask: SequenceMask, visible: VisibleKeys, *, cp: int, method: Method, count_own: bool
) -> _Loads:
    assignment = assign(mask, cp=cp, method=method, tile=TILE)
    edges = assignment.cut.edges
    tiles = tile_counts(mask, edges=edges, tile_keys=TILE.keys, visible=visible)
    area = TILE.keys * assignment.cut.sizes
    return _Loads(
        pairs=np.bincount(assignment.owner, weights=tiles * area, minlength=cp),
        slots=assignment.local_length(),
        length=mask.length,
        received=np.array([_received(mask, visible, assignment, rank) for rank in range(cp)]),
        own_share=_own_share(mask, visible, assignment) if count_own else None,
    )


def _received(
    mask: SequenceMask, visible: VisibleKeys, assignment: TokenAssignment, rank: int
) -> int:
    """Keys of pieces that some query of a rank sees and that it does not hold."""
    cut = assignment.cut
    seen = needed(mask, edges=cut.edges, queries=assignment.held(rank), visible=visible)
    return int(cut.sizes[seen & (assignment.owner != rank)].sum())


def _own_share(mask: SequenceMask, visible: VisibleKeys, assignment: TokenAssignment) -> float:
    """Share of tiles whose keys their rank holds, over all ranks."""
    tiles = {True: 0, False: 0}
    for rank in range(assignment.cut.cp):
        held = assignment.held(rank)
        edges = np.append(np.arange(0, held.size, TILE.queries), held.size)
        for own, keys in ((True, held), (False, whole(mask.length))):
            counts = tile_counts(
                mask, edges=edges, tile_keys=TILE.keys, queries=held, keys=keys, visible=visible
            )
            tiles[own] += int(counts.sum())
    return tiles[True] / tiles[False] if tiles[False] else 1.0
