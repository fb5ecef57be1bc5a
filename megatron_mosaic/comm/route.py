"""Which rank sends which rows of a boundary tensor to which rank.

A route moves the rows in one direction: ``route`` brings activations from the ranks that
produce them to those that keep them, ``gradient_route`` brings the gradient back. Both follow
from data equal on every rank, so all ranks derive the same route without talking.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from megatron_mosaic.errors import LayoutError
from megatron_mosaic.layout.ownership import Ownership
from megatron_mosaic.layout.rows import Interval, Rows, split_evenly

# Sets of ranks and the rows that they hold; equal rows, equal values.
Part = Sequence[tuple[tuple[int, ...], Rows]]
NodeOf = Callable[[int], int]  # node of a global rank


class Leg(NamedTuple):
    """Rows that one rank hands to another, or keeps if both are the same rank."""

    source: int
    destination: int
    interval: Interval


@dataclass(frozen=True, kw_only=True, slots=True)
class Gather:
    """Rows that replicas receive in shares, to be all-gathered among them.

    Args:
        ranks: The replicas, ascending. Legs bring ``share(t)`` to the ``t``-th of them.
        rows: Rows of the boundary tensor that form the gathered tensor.
    """

    ranks: tuple[int, ...]
    rows: Rows

    @property
    def share_size(self) -> int:
        """Rows of one share: equal for all, as an all-gather needs it; the last may have fewer."""
        return -(-self.rows.size // len(self.ranks))

    def share(self, index: int) -> Interval:
        """Rows of the gathered tensor that the replica at ``index`` receives from elsewhere."""
        share = Interval(index * self.share_size, (index + 1) * self.share_size)
        return share.clip(Interval(0, self.rows.size))


@dataclass(frozen=True, kw_only=True, slots=True)
class Route:
    """How rows get from the ranks that hold them to the ranks that want them.

    Args:
        held: Rows that every rank which may send has.
        wanted: Rows that each receiving rank has in the end.
        legs: In the order in which every rank issues its own. A row that reaches a rank by
            several legs is the sum of what they bring; one that no leg brings is zero.
        gathers: What is all-gathered after the legs; a rank is in one at most.
    """

    held: Mapping[int, Rows]
    wanted: Mapping[int, Rows]
    legs: tuple[Leg, ...]
    gathers: tuple[Gather, ...]

    def gather_of(self, rank: int) -> Gather | None:
        """The gather that a rank takes part in."""
        return next((gather for gather in self.gathers if rank in gather.ranks), None)


def route(produced: Ownership, kept: Ownership, *, node_of: NodeOf | None = None) -> Route:
    """Routes the rows of one microbatch to the ranks that keep them.

    Every row comes from one rank: the destination itself, else a rank of its node, else the
    least loaded; the ranks that hold the row share the work. Replicas of a destination that
    hold nothing themselves receive one share each, to be gathered among them.

    Raises:
        LayoutError: A kept row is not produced by any rank.
    """
    builder = _RouteBuilder(parts=(_sorted_sets(produced),), node_of=node_of)
    for replicas, rows in _sorted_sets(kept):
        if builder.deliver(replicas, rows) < rows.size:
            _refuse(produced, kept)
    return builder.route(held=produced.rows, wanted=kept.rows)


def gradient_route(produced: Ownership, kept: Ownership, *, node_of: NodeOf | None = None) -> Route:
    """Routes the gradient of the kept rows back to every rank that produced them.

    Replicas of a destination hold the same gradient, so one speaks for all of them. Where
    several sets of replicas kept a row, each has a part of its gradient and all are brought.
    """
    parts = tuple((each,) for each in _sorted_sets(kept))
    builder = _RouteBuilder(parts=parts, node_of=node_of)
    for replicas, rows in _sorted_sets(produced):
        builder.deliver(replicas, rows)
    return builder.route(held=kept.rows, wanted=produced.rows)


def _sorted_sets(ownership: Ownership) -> list[tuple[tuple[int, ...], Rows]]:
    sets = sorted(tuple(sorted(replicas)) for replicas in ownership.replicas)
    return [(replicas, ownership.rows[replicas[0]]) for replicas in sets]


def _refuse(produced: Ownership, kept: Ownership) -> None:
    available = Rows.of(interval for rows in produced.rows.values() for interval in rows)
    for rank, rows in kept.rows.items():
        for interval in rows:
            if sum(part.size for part in available.inside(interval)) < interval.size:
                raise LayoutError(
                    f"boundary: rows={list(interval)} kept by rank {rank} must be among the rows "
                    f"{[list(each) for each in available]} that are produced; "
                    f"derive both from the same row counts"
                )


class _Piece(NamedTuple):
    """Consecutive rows with the same holders."""

    rows: Interval
    holders: tuple[tuple[int, ...], ...]  # one tuple of ranks for each part that has the rows


class _RouteBuilder:
    """Collects legs and gathers for one set of replicas after the other."""

    def __init__(self, *, parts: Sequence[Part], node_of: NodeOf | None) -> None:
        self.node_of = node_of
        self.pieces = _pieces(parts)
        self._starts = [piece.rows.start for piece in self.pieces]
        self._stops = [piece.rows.stop for piece in self.pieces]
        self.legs: list[Leg] = []
        self.gathers: list[Gather] = []
        self.load: dict[int, int] = {}  # rows that a rank sends to others

    def route(self, *, held: Mapping[int, Rows], wanted: Mapping[int, Rows]) -> Route:
        return Route(
            held=dict(held),
            wanted=dict(wanted),
            legs=tuple(self.legs),
            gathers=tuple(self.gathers),
        )

    def deliver(self, replicas: tuple[int, ...], rows: Rows) -> int:
        """Brings the sum of all parts of ``rows`` to each of the replicas.

        Returns:
            How many of the rows some part has.
        """
        shared, num_found = [], 0
        for piece in self._inside(rows):
            num_found += piece.rows.size
            if len(replicas) == 1:
                self._bring_whole(piece, replicas)
            elif len(piece.holders) == 1 and not set(piece.holders[0]).isdisjoint(replicas):
                # Some replica has the rows: the others take them from it, nothing else moves.
                self._bring_whole(piece, replicas)
            else:
                shared.append(piece)
        if shared:
            self._bring_shares(shared, replicas)
        return num_found

    def _inside(self, rows: Rows) -> Iterator[_Piece]:
        """Yields the pieces inside some rows, each clipped to them; ascending."""
        for interval in rows:
            start, stop = interval
            first = bisect_right(self._stops, start)
            last = bisect_left(self._starts, stop, lo=first)
            for piece in self.pieces[first:last]:
                if start <= piece.rows.start and piece.rows.stop <= stop:
                    yield piece
                else:
                    yield _Piece(piece.rows.clip(interval), piece.holders)

    def _bring_whole(self, piece: _Piece, replicas: tuple[int, ...]) -> None:
        for holders in piece.holders:
            lacking = [rank for rank in replicas if rank not in holders]
            for rank in replicas:
                if rank in holders:
                    self._add(rank, rank, piece.rows)
                else:
                    near = [holder for holder in holders if holder in replicas]
                    self._fetch(rank, piece.rows, near or holders, num_sharing=len(lacking))

    def _bring_shares(self, pieces: Sequence[_Piece], replicas: tuple[int, ...]) -> None:
        gather = Gather(ranks=replicas, rows=Rows.of(piece.rows for piece in pieces))
        self.gathers.append(gather)
        for index, piece, rows in _shared_pieces(gather, pieces):
            rank = replicas[index]
            for holders in piece.holders:
                if rank in holders:
                    self._add(rank, rank, rows)
                else:
                    self._fetch(rank, rows, holders, num_sharing=len(replicas))

    def _fetch(
        self, rank: int, rows: Interval, holders: Sequence[int], *, num_sharing: int
    ) -> None:
        """Fetches rows from their holders, of which ``num_sharing`` ranks make use alike."""
        if self.node_of is not None:
            node = self.node_of(rank)
            holders = [holder for holder in holders if self.node_of(holder) == node] or holders
        if len(holders) == 1:
            self._add(holders[0], rank, rows)
            return
        if num_sharing == 1:
            # All take part. What cannot be split evenly goes round with the rows: nobody's turn
            # depends on other legs, so a rank's part is derived without them.
            turn = rows.start % len(holders)
            sources = [*holders[turn:], *holders[:turn]]
        else:
            by_load = sorted(holders, key=lambda holder: (self.load.get(holder, 0), holder))
            sources = by_load[: -(-len(holders) // num_sharing)]
        for source, part in zip(sources, split_evenly(rows.size, len(sources)), strict=True):
            self._add(source, rank, part.shift(rows.start))

    def _add(self, source: int, destination: int, rows: Interval) -> None:
        if rows.start == rows.stop:
            return
        self.legs.append(Leg(source, destination, rows))
        if source != destination:
            self.load[source] = self.load.get(source, 0) + rows.stop - rows.start


def _pieces(parts: Sequence[Part]) -> list[_Piece]:
    """Cuts all rows where their holders change; ascending."""
    held = [(interval, ranks) for part in parts for ranks, rows in part for interval in rows]
    held.sort()
    if all(before[0].stop <= after[0].start for before, after in pairwise(held)):
        # Most often no two sets of replicas hold the same rows: nothing is to be cut.
        return [_Piece(interval, (ranks,)) for interval, ranks in held]
    return _cut_pieces(parts)


def _cut_pieces(parts: Sequence[Part]) -> list[_Piece]:
    cuts = sorted({bound for part in parts for _, rows in part for each in rows for bound in each})
    holders: list[dict[int, list[int]]] = [{} for _ in cuts]  # of the rows that follow each cut
    for index, part in enumerate(parts):
        for ranks, rows in part:
            for start, stop in rows:
                for cut in range(bisect_left(cuts, start), bisect_left(cuts, stop)):
                    holders[cut].setdefault(index, []).extend(ranks)
    return [
        _Piece(Interval(*bounds), tuple(tuple(sorted(ranks)) for ranks in of_parts.values()))
        for bounds, of_parts in zip(pairwise(cuts), holders, strict=False)
        if of_parts
    ]


def _shared_pieces(
    gather: Gather, pieces: Sequence[_Piece]
) -> Iterator[tuple[int, _Piece, Interval]]:
    """Rows of each piece that belong to each share, one share after the other."""
    size, before = gather.share_size, 0
    for piece in pieces:
        start, stop = piece.rows
        for index in range(before // size, -(-(before + stop - start) // size)):
            first = max(start, start + index * size - before)
            last = min(stop, start + (index + 1) * size - before)
            yield index, piece, Interval(first, last)
        before += stop - start
