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

# Blocks of which a rank should have at least as many, so that they can be balanced: at fewer the
# imbalance grows fast (256 tokens at 32k and CP 32: 1.39, 512: 2.42).
BLOCKS_PER_RANK = 8
# Rows of the smallest matrix instruction of tensor cores: shorter blocks only scatter a rank's
# tokens.
LEAST_BLOCK = 16
# Blocks of a rank, less than twice as many, that ``local`` moves about.
MOST_LOCAL_BLOCKS = 32


def assign(mask: SequenceMask, *, cp: int, method: Method, tile: Tile) -> TokenAssignment:
    """Decides which rank keeps which tokens of a sequence.

    The same mask has the same assignment, on every rank and in every run. Callers that ask again
    and again keep the answer.

    Args:
        mask: Mask of the sequence.
        cp: Ranks.
        method: ``contiguous`` and ``zigzag`` go by position alone, ``lpt`` by cost alone;
            ``balanced`` equals tokens and cost, ``local`` nearly so, with less traffic of keys.
        tile: Tiles of the attention kernel.

    Raises:
        LayoutError: The sequence has no tokens, or there are no ranks.
    """
    block = block_size(mask.length, cp=cp, tile=tile)
    cut = SequenceCut(length=mask.length, cp=cp, block=block)
    if method == "contiguous":
        return contiguous(cut)
    if method == "zigzag":
        return zigzag(cut)
    visible = VisibleKeys.of(mask)
    if method == "local":
        return local(mask, cp=cp, block=block, tile=tile, visible=visible)
    costs = tile_counts(mask, edges=cut.edges, tile_keys=tile.keys, visible=visible)
    return longest_first(cut, costs) if method == "lpt" else balanced(cut, costs)


def block_size(length: int, *, cp: int, tile: Tile) -> int:
    """Chooses how many tokens stay together.

    A block is a row of the kernel's tiles: then each row of tiles that a rank computes is one
    block, and its cost is known exactly. Where that leaves a rank too few blocks to be balanced, a
    block is half of it, and so on; such a row of tiles has several blocks, and computes the tiles
    that any of them needs.

    Args:
        length: Tokens of the sequence.
        cp: Ranks.
        tile: Tiles of the attention kernel.
    """
    block = tile.queries
    while block > LEAST_BLOCK and length // (cp * block) < BLOCKS_PER_RANK:
        block = max(LEAST_BLOCK, block // 2)
    return block


def contiguous(cut: SequenceCut) -> TokenAssignment:
    """Gives every rank consecutive blocks, whatever they cost."""
    per_rank = cut.num_blocks // cut.cp
    blocks = np.repeat(np.arange(cut.cp), per_rank)
    return TokenAssignment(cut=cut, owner=np.concatenate((blocks, _rest(cut))))


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


def local(
    mask: SequenceMask, *, cp: int, block: int, tile: Tile, visible: VisibleKeys
) -> TokenAssignment:
    """Keeps documents together as far as cost and tokens allow: see :mod:`tokens.local`.

    Blocks of long sequences are several rows of tiles: their number decides how long this takes.
    """
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
