"""Assigns tokens of packed documents so that ranks need few keys of each other.

What a rank needs of a document are the keys from the first to the last that its tokens see: for
text all from the document's beginning. A document that one rank keeps needs nothing of others,
one that several share is received by each of them up to its own last token. Long documents have
most of the tiles and few of the tokens, so their ends are shared by ranks that have short
documents beside.
"""

from dataclasses import dataclass
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from megatron_mosaic.tokens.assignment import SequenceCut
from megatron_mosaic.tokens.mask import SequenceMask
from megatron_mosaic.tokens.ranges import Integers, counted_from
from megatron_mosaic.tokens.visible import VisibleKeys

Numbers = NDArray[np.float64]

# What a rank may have of the mean, of cost and of tokens; a search aims lower, so that ranks that
# it has relieved can still take something.
LIMITS = np.array([1.05, 1.10])
_AIMS = np.array([1.03, 1.08])
# Where a search starts: documents that cost less than the first share of a rank's mean are kept
# whole, and the others are gathered on one rank of so many. Which start leads to the least traffic
# differs from sequence to sequence: on packed sequences of cp_balance the first is best half of
# the time, and the last where documents are short beside a rank's tokens.
_STARTS = ((0.2, 1), (0.3, 1), (1.0, 2))
_MAX_STEPS = 150
# Tokens, as a share of a rank's, that a move must save or make room for to be worth a step.
_STEP = 0.02
_LEAST_RELIEF = 1e-7
_LENGTHS = np.array([1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 48, 64])


def owners(
    mask: SequenceMask, *, cut: SequenceCut, costs: Integers, visible: VisibleKeys
) -> Integers:
    """Gives pieces to ranks, with few keys that a rank needs of others.

    Cost and tokens of a rank are at most :data:`LIMITS` of the mean wherever the search finds that;
    a sequence that is hard to divide goes beyond.

    Args:
        mask: Mask of the sequence.
        cut: Its pieces.
        costs: Tiles of each piece.
        visible: ``VisibleKeys.of(mask)``.

    Returns:
        Rank of each piece.
    """
    pieces = _Pieces.of(mask, cut, costs, visible)
    starts = [_by_document(pieces, cut.cp, *start) for start in _STARTS]
    best = _Division.of(pieces, starts[0].copy(), cut.cp)
    _relieve(best)
    for start in starts[1:]:
        if (start == starts[0]).all():
            continue
        other = _Division.of(pieces, start, cut.cp)
        _relieve(other, most_traffic=best.traffic if best.excess.max() <= 1 else np.inf)
        best = min(best, other, key=lambda each: each.rating)
    return best.owner


class _Pieces(NamedTuple):
    """What is known of each piece; a piece in two documents belongs to the first."""

    amounts: Numbers  # cost and tokens, as shares of a rank's mean [2, pieces]
    document: Integers  # ascending from 0
    first: Numbers  # first key that it sees, in shares of a rank's mean, too; inf for none
    last: Numbers  # behind the last key; -inf for none

    @classmethod
    def of(
        cls, mask: SequenceMask, cut: SequenceCut, costs: Integers, visible: VisibleKeys
    ) -> Self:
        """Finds the pieces' documents and what they see."""
        begins, ends = cut.edges[:-1], cut.edges[1:]
        segment = np.searchsorted(mask.stops, begins, side="right")
        count = np.searchsorted(mask.stops, ends - 1, side="right") + 1 - segment
        row, index = counted_from(segment, count, np.arange(len(begins)))
        first = np.full(mask.num_segments, mask.length)
        last = np.zeros(mask.num_segments, dtype=np.int64)
        np.minimum.at(first, visible.seen.row, visible.seen.start)
        np.maximum.at(last, visible.seen.row, visible.seen.stop)
        first, last = first[visible.row_of], last[visible.row_of]
        causal = visible.causal_from >= 0
        first[causal] = np.minimum(first, visible.causal_from)[causal]
        own_last = np.where(causal[index], np.minimum(mask.stops[index], ends[row]), 0)
        starts = np.flatnonzero(np.diff(row, prepend=-1))
        first = np.minimum.reduceat(first[index], starts)
        last = np.maximum.reduceat(np.maximum(last[index], own_last), starts)
        document = np.cumsum(np.diff(mask.document[segment], prepend=mask.document[0]) != 0)
        mean_cost, mean_tokens = max(int(costs.sum()), 1) / cut.cp, mask.length / cut.cp
        sees = first < last
        return cls(
            amounts=np.stack((costs / mean_cost, cut.sizes / mean_tokens)).astype(np.float64),
            document=document,
            first=np.where(sees, first / mean_tokens, np.inf),
            last=np.where(sees, last / mean_tokens, -np.inf),
        )


def _by_document(pieces: _Pieces, cp: int, whole_below: float, gathered: int) -> Integers:
    """Shares the long documents of a sequence between ranks, and keeps the short ones whole.

    Each rank gets consecutive pieces of long documents that cost more than as many tokens of short
    ones: equally much more. Short documents then fill the ranks up to the mean of both.
    """
    count = pieces.document[-1] + 1
    amounts = np.stack([np.bincount(pieces.document, each, count) for each in pieces.amounts])
    is_short = amounts[0] < whole_below
    short_cost, short_tokens = amounts[:, is_short].sum(axis=1)
    owner = np.zeros(len(pieces.document), dtype=np.int64)
    loads = np.zeros((2, cp))
    long = np.flatnonzero(~is_short[pieces.document])
    if len(long):
        cost, tokens = pieces.amounts[:, long]
        more = cost - tokens * (short_cost / short_tokens if short_tokens else 0.0)
        before = np.maximum.accumulate(np.cumsum(more) - more / 2)
        owner[long] = np.clip(before * (cp / gathered / max(more.sum(), 1e-9)), 0, cp - 1)
        loads += [np.bincount(owner[long], each, cp) for each in (cost, tokens)]
    rank_of = np.zeros(count, dtype=np.int64)
    short = np.flatnonzero(is_short)
    for document in short[np.argsort(-amounts[:, short].max(axis=0), kind="stable")]:
        after = loads + amounts[:, document, None]
        rank = int(np.argmin((after / LIMITS[:, None]).max(axis=0)))
        rank_of[document] = rank
        loads[:, rank] = after[:, rank]
    return np.where(is_short[pieces.document], rank_of[pieces.document], owner)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Division:
    """Who has which pieces; changed in place.

    Args:
        pieces: The pieces.
        owner: Rank of each.
        loads: Cost and tokens of each rank ``[2, cp]``.
        first: First key that a rank's pieces of a document see ``[cp, documents]``.
        last: Behind the last key.
    """

    pieces: _Pieces
    owner: Integers
    loads: Numbers
    first: Numbers
    last: Numbers

    @classmethod
    def of(cls, pieces: _Pieces, owner: Integers, cp: int) -> Self:
        """Derives what each rank has and needs."""
        shape = (cp, pieces.document[-1] + 1)
        first, last = np.full(shape, np.inf), np.full(shape, -np.inf)
        np.minimum.at(first, (owner, pieces.document), pieces.first)
        np.maximum.at(last, (owner, pieces.document), pieces.last)
        loads = np.stack([np.bincount(owner, each, cp) for each in pieces.amounts])
        return cls(pieces=pieces, owner=owner, loads=loads, first=first, last=last)

    @property
    def excess(self) -> Numbers:
        """What each rank has, over what it may have; the worse of cost and tokens."""
        return (self.loads / LIMITS[:, None]).max(axis=0)

    @property
    def rating(self) -> tuple[float, float]:
        """What makes a division worse than another: beyond the limits, then by traffic."""
        return max(float(self.excess.max()), 1.0), self.traffic

    @property
    def traffic(self) -> float:
        """Keys that ranks need, their own among them."""
        return float(np.maximum(self.last - self.first, 0).sum())

    def growth(self, given: Integers, rank: int | slice = slice(None)) -> Numbers:
        """Keys that a rank, or each ``[cp, pieces]``, needs more if it gets one of some pieces."""
        document = self.pieces.document[given]
        first, last = self.first[rank, document], self.last[rank, document]
        together = np.maximum(last, self.pieces.last[given])
        together = together - np.minimum(first, self.pieces.first[given])
        return np.maximum(together, 0) - np.maximum(last - first, 0)

    def give(self, given: Integers, rank: int) -> None:
        """Gives pieces of one document, all of one rank, to another."""
        document, before = self.pieces.document[given[0]], self.owner[given[0]]
        amounts = self.pieces.amounts[:, given].sum(axis=1)
        self.owner[given] = rank
        self.loads[:, before] -= amounts
        self.loads[:, rank] += amounts
        members = np.flatnonzero(self.pieces.document == document)
        for each in (before, rank):
            held = members[self.owner[members] == each]
            self.first[each, document] = self.pieces.first[held].min(initial=np.inf)
            self.last[each, document] = self.pieces.last[held].max(initial=-np.inf)


def _relieve(division: _Division, *, most_traffic: float = np.inf) -> None:
    """Moves pieces away from the rank that has most too much, until none has.

    Args:
        division: What is changed.
        most_traffic: Where to give up: what another division does with.
    """
    for _ in range(_MAX_STEPS):
        rank = int(np.argmax(division.excess))
        if division.excess[rank] <= 1 or division.traffic > most_traffic:
            break
        if not (_move(division, rank) or _exchange(division, rank)):
            break


def _move(division: _Division, rank: int) -> bool:
    """Makes the move away from a rank that costs least traffic for what it relieves.

    Returns:
        Whether any move relieves ranks.
    """
    mine = np.flatnonzero(division.owner == rank)
    begins, ends = _runs(division.pieces.document[mine])
    before = np.pad(np.cumsum(division.pieces.amounts[:, mine], axis=1), ((0, 0), (1, 0)))
    moved = before[:, ends] - before[:, begins]
    loads = division.loads
    relief = _too_much(loads)[:, None] - _too_much(loads[:, :, None] + moved[:, None, :])
    relief += _too_much(loads[:, rank]) - _too_much(loads[:, rank, None] - moved)
    relief[rank] = 0
    best = _cheapest(_more_traffic(division, rank, mine, begins, ends), relief)
    if best is None:
        return False
    other, run = best
    division.give(mine[begins[run] : ends[run]], other)
    return True


def _exchange(division: _Division, rank: int) -> bool:
    """Makes the best exchange of one piece of a rank for one of another.

    Returns:
        Whether any exchange relieves ranks.
    """
    pieces, loads, owner = division.pieces, division.loads, division.owner
    mine = np.flatnonzero(owner == rank)
    moved = pieces.amounts[:, mine, None] - pieces.amounts[:, None, :]
    relief = _too_much(loads)[owner] - _too_much(loads[:, None, owner] + moved)
    relief += _too_much(loads[:, rank]) - _too_much(loads[:, rank, None, None] - moved)
    relief[:, owner == rank] = 0
    given = division.growth(mine)[owner].T
    taken = division.growth(np.arange(len(owner)), rank)
    best = _cheapest(given + taken, relief)
    if best is None:
        return False
    place, piece = best
    other = int(owner[piece])
    division.give(mine[place, None], other)
    division.give(np.array([piece]), rank)
    return True


def _cheapest(traffic: Numbers, relief: Numbers) -> tuple[int, int] | None:
    """Where traffic is least for what is relieved, among what relieves ranks at all."""
    helps = relief > _LEAST_RELIEF
    price = np.full(relief.shape, np.inf)
    np.divide(np.maximum(traffic, 0) + _STEP, relief, out=price, where=helps)
    row, column = np.unravel_index(np.argmin(price), price.shape)
    return (int(row), int(column)) if helps[row, column] else None


def _too_much(loads: Numbers) -> Numbers:
    """Squares of what ranks have beyond the aims; the first axis is cost and tokens."""
    aims = _AIMS.reshape(2, *(1 for _ in loads.shape[1:]))
    return (np.maximum(loads - aims, 0) ** 2).sum(axis=0)


def _runs(document: Integers) -> tuple[Integers, Integers]:
    """Stretches of a rank's pieces that may move together: of one document, of some lengths.

    Returns:
        Where they begin, and where they end; whole documents are among them.
    """
    place = np.arange(len(document))
    end = np.searchsorted(document, document, side="right")
    begins = np.concatenate((np.repeat(place, len(_LENGTHS)), place))
    ends = np.concatenate(((place[:, None] + _LENGTHS).ravel(), end))
    fits = ends <= end[begins]
    return begins[fits], ends[fits]


def _more_traffic(
    division: _Division, rank: int, mine: Integers, begins: Integers, ends: Integers
) -> Numbers:
    """Keys that ranks need more if a run of one rank's pieces moves to another ``[cp, runs]``."""
    pieces = division.pieces
    held = pieces.document[mine]
    document = held[begins]
    first, last = _hull(pieces, mine, begins, ends)
    before = _hull(pieces, mine, np.searchsorted(held, document, side="left"), begins)
    behind = _hull(pieces, mine, ends, np.searchsorted(held, document, side="right"))
    left = np.maximum(before[1], behind[1]) - np.minimum(before[0], behind[0])
    was = division.last[rank, document] - division.first[rank, document]
    less = np.maximum(left, 0) - np.maximum(was, 0)
    there = division.first[:, document], division.last[:, document]
    present = np.maximum(there[1] - there[0], 0)
    together = np.maximum(there[1], last) - np.minimum(there[0], first)
    return np.maximum(together, 0) - present + less


def _hull(
    pieces: _Pieces, mine: Integers, begins: Integers, ends: Integers
) -> tuple[Numbers, Numbers]:
    """First and last key that each run of a rank's pieces sees; of no pieces, none."""
    bounds = np.stack((begins, ends), axis=1).ravel()
    # Of bounds in turn, every other entry is a run; an end may be behind the last piece.
    padded = np.append(mine, mine[-1])
    first = np.minimum.reduceat(pieces.first[padded], bounds)[::2]
    last = np.maximum.reduceat(pieces.last[padded], bounds)[::2]
    some = begins < ends
    return np.where(some, first, np.inf), np.where(some, last, -np.inf)
