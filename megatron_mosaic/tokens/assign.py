"""Assigns the pieces of a sequence to context-parallel ranks, so that no rank waits for another.

The cost of a piece is the number of tiles that the attention kernel computes for its queries.
"""

from collections.abc import Callable, Mapping
from heapq import heapify, heapreplace
from typing import Final

import numpy as np

from megatron_mosaic.tokens.assignment import SequenceCut, TokenAssignment
from megatron_mosaic.tokens.deal import deal, improve
from megatron_mosaic.tokens.names import Method
from megatron_mosaic.tokens.ranges import Integers

# Blocks of which a rank should have at least as many, so that they can be balanced: at fewer the
# imbalance grows fast (256 tokens at 32k and CP 32: 1.39, 512: 2.42).
BLOCKS_PER_RANK = 8


def contiguous(cut: SequenceCut, costs: Integers) -> TokenAssignment:
    """Gives every rank consecutive blocks, whatever they cost."""
    per_rank = cut.num_blocks // cut.cp
    blocks = np.repeat(np.arange(cut.cp), per_rank)
    return TokenAssignment(cut=cut, owner=np.concatenate((blocks, _rest(cut))))


def zigzag(cut: SequenceCut, costs: Integers) -> TokenAssignment:
    """Gives rank ``i`` of ``2 * cp`` chunks the chunks ``i`` and ``2 * cp - 1 - i``, as Megatron.

    Chunks differ by a block where their number does not divide.
    """
    chunk = np.arange(cut.num_blocks) * 2 * cut.cp // max(cut.num_blocks, 1)
    blocks = np.minimum(chunk, 2 * cut.cp - 1 - chunk)
    return TokenAssignment(cut=cut, owner=np.concatenate((blocks, _rest(cut))))


def longest_first(cut: SequenceCut, costs: Integers) -> TokenAssignment:
    """Gives the most expensive piece that is left to the least loaded rank (LPT).

    Ranks may have unlike numbers of tokens.

    Source: R. L. Graham, Bounds on multiprocessing timing anomalies, 1969; for tokens
    Cornstarch, arXiv 2503.11367, section 4.3.
    """
    owner = np.empty(cut.num_pieces, dtype=np.int64)
    loads = [(0, rank) for rank in range(cut.cp)]
    heapify(loads)
    for piece in np.argsort(-costs, kind="stable").tolist():
        load, rank = loads[0]
        owner[piece] = rank
        heapreplace(loads, (load + int(costs[piece]), rank))
    return TokenAssignment(cut=cut, owner=owner)


def balanced(cut: SequenceCut, costs: Integers) -> TokenAssignment:
    """Gives every rank as many tokens as any other, and as equal a cost as can be.

    Blocks are dealt in rounds of equally expensive ones, one for each rank, and then swapped
    between the most loaded rank and others.
    """
    rest = _rest(cut)
    loads = np.bincount(rest, weights=costs[cut.num_blocks :], minlength=cut.cp)
    blocks = np.empty(0, dtype=np.int64)
    if cut.num_blocks:
        dealt = deal(costs[: cut.num_blocks], loads)
        blocks = improve(dealt).owner()
    return TokenAssignment(cut=cut, owner=np.concatenate((blocks, rest)))


METHODS: Final[Mapping[Method, Callable[[SequenceCut, Integers], TokenAssignment]]] = {
    "contiguous": contiguous,
    "zigzag": zigzag,
    "lpt": longest_first,
    "balanced": balanced,
}


def _rest(cut: SequenceCut) -> Integers:
    """One of the small pieces at the end for each rank, as far as there are any."""
    return np.arange(cut.num_pieces - cut.num_blocks)
