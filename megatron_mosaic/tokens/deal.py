"""Deals equally many blocks to every rank so that their costs add up alike.

First in rounds, then by exchanges between all loaded and all idle ranks at once, then by exchanges
of the most loaded rank alone, of several blocks if need be.
"""

from dataclasses import dataclass
from functools import cache
from itertools import combinations, takewhile
from math import comb

import numpy as np
from numpy.typing import NDArray

from megatron_mosaic.tokens.ranges import Integers

# Rounds that are dealt one by one; the others, of nearly equal blocks, all at once.
_LARGE_ROUNDS = 256
# More of these change nothing that the next step would not find, on all masks of cp_balance.
_MAX_SWEEPS = 16
_MAX_EXCHANGES = 128
# Of the mean: smaller differences between ranks are not worth a search.
_TOLERANCE = 5e-4
# Blocks of a rank that a sweep looks at: with more of them, these have costs enough to choose from.
_MAX_COMPARED = 48
# Sets of a rank's blocks that are tried: all of up to four blocks where a rank has eight.
_MAX_SETS = 128


@dataclass(frozen=True, kw_only=True, eq=False)
class Deal:
    """Which rank has which blocks; changed in place.

    Args:
        blocks: Blocks of each rank ``[cp, blocks per rank]``.
        costs: Their costs ``[cp, blocks per rank]``.
        loads: What each rank has to compute in all ``[cp]``.
    """

    blocks: Integers
    costs: NDArray[np.float64]
    loads: NDArray[np.float64]

    @property
    def is_level(self) -> bool:
        """Whether no rank has more to compute than is worth a search."""
        return bool(self.loads.max() <= self.loads.mean() * (1 + _TOLERANCE))

    def owner(self) -> Integers:
        """Rank of every block."""
        owner = np.empty(self.blocks.size, dtype=np.int64)
        owner[self.blocks] = np.arange(len(self.blocks))[:, None]
        return owner

    def exchange(self, ranks: Integers, own: Integers, others: Integers, theirs: Integers) -> None:
        """Exchanges blocks between pairs of ranks; no rank is in two pairs.

        Args:
            ranks: One rank of each pair ``[pairs, 1]``.
            own: Places of its blocks ``[pairs, blocks]``.
            others: The other ranks, as ``ranks``.
            theirs: Places of as many of their blocks.
        """
        moved = (self.costs[ranks, own] - self.costs[others, theirs]).sum(axis=1, keepdims=True)
        for table in (self.blocks, self.costs):
            table[ranks, own], table[others, theirs] = table[others, theirs], table[ranks, own]
        self.loads[ranks] -= moved
        self.loads[others] += moved


def deal(costs: Integers, loads: NDArray[np.float64]) -> Deal:
    """Deals blocks so that the most loaded rank has as little to compute as can be found.

    Args:
        costs: Of every block; as many blocks as a multiple of the ranks.
        loads: What each rank has to compute beside them.
    """
    dealt = _in_rounds(costs, loads)
    for _ in range(_MAX_SWEEPS):
        if dealt.is_level or not _exchange_in_pairs(dealt):
            break
    kinds = _kinds_of_sets(dealt.blocks.shape[1])
    for _ in range(_MAX_EXCHANGES):
        if dealt.is_level or not any(_relieve(dealt, sets) for sets in kinds):
            break
    return dealt


def _in_rounds(costs: Integers, loads: NDArray[np.float64]) -> Deal:
    """Deals one block to each rank in a round, the dearest to the least loaded rank.

    Blocks of a round cost about the same. Rounds with small differences come first and are dealt
    back and forth, all at once; what decides are those with large ones.
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
    blocks = np.take_along_axis(order, np.argsort(rank_of, axis=1), axis=1).T.copy()
    return Deal(blocks=blocks, costs=costs[blocks].astype(np.float64), loads=loads)


def _exchange_in_pairs(dealt: Deal) -> bool:
    """Pairs the most loaded rank with the least loaded one, the second with the second least, ...

    Each pair exchanges the two blocks that bring it nearest to its mean.

    Returns:
        Whether any pair has exchanged blocks.
    """
    cp, per_rank = dealt.costs.shape
    order = np.argsort(dealt.loads, kind="stable")
    idle, busy = order[: cp // 2], order[::-1][: cp // 2]
    gap = dealt.loads[busy] - dealt.loads[idle]
    compared = np.unique(np.linspace(0, per_rank - 1, _MAX_COMPARED).astype(np.int64))
    own, theirs = (dealt.costs[each[:, None], compared] for each in (busy, idle))
    moved = (own[:, :, None] - theirs[:, None, :]).reshape(len(gap), -1)
    best = np.argmin(np.abs(moved - gap[:, None] / 2), axis=1)
    moved = np.take_along_axis(moved, best[:, None], axis=1)[:, 0]
    helps = (moved > 0) & (moved < gap)
    row, column = np.divmod(best[helps], len(compared))
    places = compared[row, None], compared[column, None]
    dealt.exchange(busy[helps, None], places[0], idle[helps, None], places[1])
    return bool(helps.any())


def _relieve(dealt: Deal, sets: Integers) -> bool:
    """Makes the best exchange between the most loaded rank and any other.

    Args:
        dealt: What is changed.
        sets: Sets of places of a rank's blocks, one of which each of the two gives away.

    Returns:
        Whether any exchange helps.
    """
    loads = dealt.loads
    cp, num_sets, worst = len(loads), len(sets), int(np.argmax(loads))
    sums = dealt.costs[:, sets].sum(axis=-1)
    order = np.argsort(sums, axis=1, kind="stable")
    sums = np.take_along_axis(sums, order, axis=1)
    # The best of another rank is the set that brings both loads to their mean, or nearly so. One
    # number line for the sets of all ranks: those of the next begin beyond all of this one.
    wanted = sums[worst][:, None] - (loads[worst] - loads)[None, :] / 2
    lines = np.arange(cp) * (sums[worst, -1] + sums[:, -1].max() + loads.max())
    places = np.searchsorted((sums + lines[:, None]).ravel(), np.maximum(wanted, 0) + lines)
    places -= np.arange(cp) * num_sets
    places = np.stack((np.minimum(places, num_sets - 1), np.maximum(places - 1, 0)))
    moved = sums[worst][:, None] - sums[np.arange(cp), places]
    larger = np.maximum(loads[worst] - moved, loads + moved)
    larger[:, :, worst] = np.inf
    side, own, other = np.unravel_index(np.argmin(larger), larger.shape)
    if larger[side, own, other] >= loads[worst]:
        return False
    theirs = order[other, places[side, own, other]]
    dealt.exchange(
        np.array([[worst]]), sets[[order[worst, own]]], np.array([[other]]), sets[[theirs]]
    )
    return True


@cache
def _kinds_of_sets(per_rank: int) -> tuple[Integers, ...]:
    """Sets of places of a rank's blocks that are worth trying, by size: ``[sets, size]`` each."""
    places = range(per_rank)
    sizes = takewhile(lambda size: comb(per_rank, size) <= _MAX_SETS, range(2, per_rank // 2 + 1))
    return tuple(np.array(list(combinations(places, size))) for size in (1, *sizes))
