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
from megatron_mosaic.layout.rows import Interval, Places, Rows, split_evenly

Part = Mapping[int, Rows]  # ranks and the rows that they hold; equal rows, equal values
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
    builder = _RouteBuilder(parts=(produced.rows,), node_of=node_of or _one_node)
    _check_produced(produced, kept)
    for replicas in _sorted_sets(kept):
        builder.deliver(replicas, kept.rows[replicas[0]])
    return builder.route(wanted=kept.rows)


def gradient_route(produced: Ownership, kept: Ownership, *, node_of: NodeOf | None = None) -> Route:
    """Routes the gradient of the kept rows back to every rank that produced them.

    Replicas of a destination hold the same gradient, so one speaks for all of them. Where
    several sets of replicas kept a row, each has a part of its gradient and all are brought.
    """
    parts = tuple({rank: kept.rows[rank] for rank in replicas} for replicas in _sorted_sets(kept))
    builder = _RouteBuilder(parts=parts, node_of=node_of or _one_node)
    for replicas in _sorted_sets(produced):
        builder.deliver(replicas, produced.rows[replicas[0]])
    return builder.route(wanted=produced.rows)


def _one_node(rank: int) -> int:
    return 0


def _sorted_sets(ownership: Ownership) -> list[tuple[int, ...]]:
    return sorted(tuple(sorted(replicas)) for replicas in ownership.replicas)


def _check_produced(produced: Ownership, kept: Ownership) -> None:
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

    def __init__(self, *, parts: Sequence[Part], node_of: NodeOf) -> None:
        self.parts = parts
        self.node_of = node_of
        self.pieces = _pieces(parts)
        self.legs: list[Leg] = []
        self.gathers: list[Gather] = []
        self.load: dict[int, int] = {}  # rows that a rank sends to others

    def route(self, *, wanted: Mapping[int, Rows]) -> Route:
        held = {rank: rows for part in self.parts for rank, rows in part.items()}
        return Route(
            held=held, wanted=dict(wanted), legs=tuple(self.legs), gathers=tuple(self.gathers)
        )

    def deliver(self, replicas: tuple[int, ...], rows: Rows) -> None:
        """Brings the sum of all parts of ``rows`` to each of the replicas."""
        shared = []
        for piece in (piece for interval in rows for piece in _inside(interval, self.pieces)):
            if len(replicas) == 1:
                self._bring_whole(piece, replicas)
            elif len(piece.holders) == 1 and not set(piece.holders[0]).isdisjoint(replicas):
                # Some replica has the rows: the others take them from it, nothing else moves.
                self._bring_whole(piece, replicas)
            else:
                shared.append(piece)
        if shared:
            self._bring_shares(shared, replicas)

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
        for index, rank in enumerate(replicas):
            for piece, rows in _share_pieces(gather, index, pieces):
                for holders in piece.holders:
                    if rank in holders:
                        self._add(rank, rank, rows)
                    else:
                        self._fetch(rank, rows, holders, num_sharing=len(replicas))

    def _fetch(
        self, rank: int, rows: Interval, holders: Sequence[int], *, num_sharing: int
    ) -> None:
        """Fetches rows from their holders, of which ``num_sharing`` ranks make use alike."""
        same_node = [holder for holder in holders if self.node_of(holder) == self.node_of(rank)]
        holders = same_node or holders
        by_load = sorted(holders, key=lambda holder: (self.load.get(holder, 0), holder))
        sources = by_load[: -(-len(holders) // num_sharing)]
        for source, part in zip(sources, split_evenly(rows.size, len(sources)), strict=True):
            self._add(source, rank, part.shift(rows.start))

    def _add(self, source: int, destination: int, rows: Interval) -> None:
        if not rows.size:
            return
        self.legs.append(Leg(source, destination, rows))
        if source != destination:
            self.load[source] = self.load.get(source, 0) + rows.size


def _pieces(parts: Sequence[Part]) -> list[_Piece]:
    """Cuts all rows where their holders change; ascending."""
    cuts = sorted(
        {bound for part in parts for rows in part.values() for each in rows for bound in each}
    )
    holders: list[dict[int, list[int]]] = [{} for _ in cuts]  # of the rows that follow each cut
    for index, part in enumerate(parts):
        for rank, rows in sorted(part.items()):
            for start, stop in rows:
                for cut in range(bisect_left(cuts, start), bisect_left(cuts, stop)):
                    holders[cut].setdefault(index, []).append(rank)
    return [
        _Piece(Interval(*bounds), tuple(tuple(ranks) for ranks in of_parts.values()))
        for bounds, of_parts in zip(pairwise(cuts), holders, strict=False)
        if of_parts
    ]


def _inside(rows: Interval, pieces: Sequence[_Piece]) -> Iterator[_Piece]:
    first = bisect_right(pieces, rows.start, key=lambda piece: piece.rows.stop)
    last = bisect_left(pieces, rows.stop, key=lambda piece: piece.rows.start)
    for piece in pieces[first:last]:
        yield piece._replace(rows=piece.rows.clip(rows))


def _share_pieces(
    gather: Gather, index: int, pieces: Sequence[_Piece]
) -> Iterator[tuple[_Piece, Interval]]:
    """Rows of each piece that belong to one share."""
    share, places = gather.share(index), Places(gather.rows)
    for piece in pieces:
        first = places.find(piece.rows.start)
        assert first is not None, "the pieces are the rows of the gather"
        inside = Interval(first, first + piece.rows.size).clip(share)
        rows = inside.shift(piece.rows.start - first)
        if rows.size:
            yield piece, rows
