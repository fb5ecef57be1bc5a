"""Deals equally many blocks to every rank so that their costs add up alike.

First in rounds, then by swaps between the most loaded rank and the others.
"""

from dataclasses import dataclass
from functools import cache
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from megatron_mosaic.tokens.ranges import Integers

_LARGE_ROUNDS = 256
_MAX_SWAPS = 64
_TOLERANCE = 5e-4  # of the mean: smaller differences between ranks are not worth a search
_PAIRS_UP_TO = 12  # blocks of a rank: with more of them single swaps find enough


@dataclass(frozen=True, kw_only=True, eq=False)
class Deal:
    """Which rank has which blocks; changed in place.

    Args:
        blocks: Blocks of each rank ``[cp, blocks per rank]``, cheapest first.
        costs: Their costs ``[cp, blocks per rank]``, so ascending.
        loads: What each rank has to compute in all ``[cp]``.
    """

    blocks: Integers
    costs: NDArray[np.float64]
    loads: NDArray[np.float64]

    def owner(self) -> Integers:
        """Rank of every block."""
        owner = np.empty(self.blocks.size, dtype=np.int64)
        owner[self.blocks] = np.arange(len(self.blocks))[:, None]
        return owner

    def swap(self, rank: int, own: Integers, other: int, others: Integers) -> None:
        """Swaps some blocks of two ranks, given by their places."""
        moved = self.costs[rank, own].sum() - self.costs[other, others].sum()
        for table in (self.blocks, self.costs):
            table[rank, own], table[other, others] = table[other, others], table[rank, own]
        self.loads[rank] -= moved
        self.loads[other] += moved
        for row in (rank, other):
            order = np.argsort(self.costs[row], kind="stable")
            self.blocks[row], self.costs[row] = self.blocks[row, order], self.costs[row, order]


def deal(costs: Integers, loads: NDArray[np.float64]) -> Deal:
    """Deals blocks in rounds, the dearest of a round to the least loaded rank.

    Rounds of blocks that cost about the same come first and are dealt back and forth, all at
    once; what decides are those with large differences.

    Args:
        costs: Of every block; as many blocks as a multiple of the ranks.
        loads: What each rank has to compute beside them.
    """
    cp = len(loads)
    order = np.argsort(-costs, kind="stable").reshape(-1, cp)
    rounds = costs[order]
    by_difference = np.argsort(rounds[:, -1] - rounds[:, 0], kind="stable")
    last = max(0, len(rounds) - _LARGE_ROUNDS)
    rank_of = np.empty_like(order)
    rank_of[by_difference[:last:2]] = np.arange(cp)
    rank_of[by_difference[1:last:2]] = np.arange(cp)[::-1]
    early = by_difference[:last]
    loads = loads + np.bincount(rank_of[early].ravel(), weights=rounds[early].ravel(), minlength=cp)
    for number in by_difference[last:]:
        ranks = np.argsort(loads, kind="stable")
        rank_of[number] = ranks
        loads[ranks] += rounds[number]
    # Rounds are descending in cost: from the last one each rank has its cheapest block first.
    blocks = np.take_along_axis(order, np.argsort(rank_of, axis=1), axis=1)[::-1].T.copy()
    return Deal(blocks=blocks, costs=costs[blocks].astype(np.float64), loads=loads)


def improve(dealt: Deal) -> Deal:
    """Swaps blocks of the most loaded rank for cheaper ones as long as that helps."""
    target = dealt.loads.mean() * (1 + _TOLERANCE)
    for _ in range(_MAX_SWAPS):
        worst = int(np.argmax(dealt.loads))
        if dealt.loads[worst] <= target:
            break
        if not (_swap_one(dealt, worst) or _swap_two(dealt, worst)):
            break
    return dealt


def _swap_one(dealt: Deal, worst: int) -> bool:
    """Makes the best swap of one block for one; says whether there was one that helps."""
    cp, size = dealt.costs.shape
    loads, own = dealt.loads, dealt.costs[worst]
    # The best is the block of each rank that brings both loads to their mean, or nearly so.
    wanted = own[:, None] - (loads[worst] - loads)[None, :] / 2
    stride = own[-1] + dealt.costs[:, -1].max() + loads.max()
    line = dealt.costs + np.arange(cp)[:, None] * stride
    above = np.searchsorted(line.ravel(), np.maximum(wanted, 0) + np.arange(cp) * stride)
    above -= np.arange(cp) * size
    best = (loads[worst], 0, 0, 0)
    for places in (np.minimum(above, size - 1), np.maximum(above - 1, 0)):
        moved = own[:, None] - dealt.costs[np.arange(cp), places]
        larger = np.maximum(loads[worst] - moved, loads + moved)
        larger[:, worst] = np.inf
        row, other = np.unravel_index(np.argmin(larger), larger.shape)
        best = min(best, (larger[row, other], int(row), int(other), int(places[row, other])))
    larger, row, other, place = best
    if larger >= loads[worst]:
        return False
    dealt.swap(worst, np.array([row]), other, np.array([place]))
    return True


def _swap_two(dealt: Deal, worst: int) -> bool:
    """Makes the best swap of two blocks for two of one rank, where ranks have few blocks."""
    size = dealt.costs.shape[1]
    if not 1 < size <= _PAIRS_UP_TO:
        return False
    loads, pairs = dealt.loads, _pairs(size)
    sums = dealt.costs[:, pairs].sum(axis=-1)
    moved = sums[worst][:, None, None] - sums[None]
    larger = np.maximum(loads[worst] - moved, loads[None, :, None] + moved)
    larger[:, worst] = np.inf
    own, other, theirs = np.unravel_index(np.argmin(larger), larger.shape)
    if larger[own, other, theirs] >= loads[worst]:
        return False
    dealt.swap(worst, pairs[own], int(other), pairs[theirs])
    return True


@cache
def _pairs(size: int) -> Integers:
    """Pairs of the places of a rank's blocks ``[pairs, 2]``."""
    return np.array(list(combinations(range(size), 2)))
