"""Assigns the pieces of a sequence to context-parallel ranks, so that no rank waits for another.

The cost of a piece is the number of tiles that the attention kernel computes for its queries.
"""

from heapq import heapify, heapreplace

import numpy as np

from megatron_mosaic.tokens.assignment import SequenceCut, TokenAssignment
from megatron_mosaic.tokens.deal import deal
from megatron_mosaic.tokens.local import owners
from megatron_mosaic.tokens.mask import SequenceMask
from megatron_mosaic.tokens.names import Method
from megatron_mosaic.tokens.ranges import Integers
from megatron_mosaic.tokens.tiles import Tile, tile_counts
from megatron_mosaic.tokens.visible import VisibleKeys

# Blocks of a rank, less than twice as many, that ``local`` moves about.
MOST_LOCAL_BLOCKS = 32


def assign(mask: SequenceMask, *, cp: int, method: Method, tile: Tile) -> TokenAssignment:
    """Decides which rank keeps which tokens of a sequence.

    The same mask has the same assignment, on every rank and in every run. Callers that ask again
    and again keep the answer.

    A block of tokens that stay together is a row of the kernel's tiles, never less: a row of two
    half blocks computes the tiles that any of them sees. At 16k tokens of packed documents and 32
    ranks, which then have 4 blocks each, the slowest rank computes 1.20 of the mean that a single
    GPU's tiles would be, with half blocks 1.88. From 8 blocks for a rank on, 1.006 and less.

    Args:
        mask: Mask of the sequence.
        cp: Ranks.
        method: ``contiguous`` and ``zigzag`` go by position alone, ``lpt`` by cost alone;
            ``balanced`` equals tokens and cost, ``local`` nearly so, with less traffic of keys.
        tile: Tiles of the attention kernel.

    Raises:
        LayoutError: The sequence has no tokens, or there are no ranks.
    """
    cut = SequenceCut(length=mask.length, cp=cp, block=tile.queries)
    if method == "contiguous":
        return contiguous(cut)
    if method == "zigzag":
        return zigzag(cut)
    visible = VisibleKeys.of(mask)
    if method == "local":
        return local(mask, cp=cp, tile=tile, visible=visible)
    costs = tile_counts(mask, edges=cut.edges, tile_keys=tile.keys, visible=visible)
    return longest_first(cut, costs) if method == "lpt" else balanced(cut, costs)


def contiguous(cut: SequenceCut) -> TokenAssignment:
    """Gives every rank consecutive pieces, of nearly as many tokens, whatever they cost."""
    middle_doubled = cut.edges[:-1] + cut.edges[1:]
    return TokenAssignment(cut=cut, owner=middle_doubled * cut.cp // (2 * cut.length))


def zigzag(cut: SequenceCut) -> TokenAssignment:
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

    No rank has more than a token more than another: blocks are dealt one for one, and each rank
    has one of the small pieces at the end.
    """
    rest = _rest(cut)
    loads = np.zeros(cut.cp)
    loads[rest] = costs[cut.num_blocks :]
    blocks = np.empty(0, dtype=np.int64)
    if cut.num_blocks:
        blocks = deal(costs[: cut.num_blocks], loads).owner()
    return TokenAssignment(cut=cut, owner=np.concatenate((blocks, rest)))


def local(mask: SequenceMask, *, cp: int, tile: Tile, visible: VisibleKeys) -> TokenAssignment:
    """Keeps documents together as far as cost and tokens allow: see :mod:`tokens.local`.

    Blocks of long sequences are several rows of tiles: their number decides how long this takes.
    Where a rank has fewer than ten, one more of them is already more tokens than are allowed.
    """
    block = tile.queries
    while mask.length // (cp * block) >= 2 * MOST_LOCAL_BLOCKS:
        block *= 2
    cut = SequenceCut(length=mask.length, cp=cp, block=block)
    edges = np.union1d(cut.edges, np.arange(0, mask.length, tile.queries))
    rows = tile_counts(mask, edges=edges, tile_keys=tile.keys, visible=visible)
    costs = np.add.reduceat(rows, np.searchsorted(edges, cut.edges[:-1]))
    return TokenAssignment(cut=cut, owner=owners(mask, cut=cut, costs=costs, visible=visible))


def _rest(cut: SequenceCut) -> Integers:
    """One of the small pieces at the end for each rank, as far as there are any."""
    return np.arange(cut.num_pieces - cut.num_blocks)
