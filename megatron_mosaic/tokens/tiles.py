"""Tiles of the score matrix that an attention kernel computes, counted without the matrix.

A kernel walks over tiles of some queries by some keys, and leaves out those in which no query
sees any key. Queries and keys may be some of a sequence, as a context-parallel rank has them: the
kernel's tiles are then cut from what the rank has, one token after the other.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_mosaic.tokens.held import Held, whole
from megatron_mosaic.tokens.mask import Integers, SequenceMask
from megatron_mosaic.tokens.ranges import Ranges, counted_from, merged
from megatron_mosaic.tokens.visible import VisibleKeys


class Tile(NamedTuple):
    """Queries and keys of one tile of a kernel."""

    queries: int
    keys: int


@dataclass(frozen=True, kw_only=True, eq=False)
class TileMap:
    """Tiles that are computed, by row of tiles.

    Args:
        num_rows: Rows of tiles.
        num_columns: Columns of tiles.
        computed: Columns with a visible pair, by row; sorted, not touching.
        full: Row and column of every tile all of whose pairs are visible.
    """

    num_rows: int
    num_columns: int
    computed: Ranges
    full: tuple[Integers, Integers]


def tile_map(
    mask: SequenceMask,
    *,
    tile: Tile,
    queries: Held | None = None,
    keys: Held | None = None,
    visible: VisibleKeys | None = None,
) -> TileMap:
    """Finds the tiles that a kernel computes, and those for which it needs no mask.

    Args:
        mask: Mask of the whole sequence.
        tile: Size of the kernel's tiles.
        queries: Those that are computed, in this order; None is all.
        keys: Those that are there; None is all.
        visible: ``VisibleKeys.of(mask)``, if it is known.
    """
    queries = queries or whole(mask.length)
    keys = keys or whole(mask.length)
    visible = visible or VisibleKeys.of(mask)
    num_rows, num_columns = -(-queries.size // tile.queries), -(-keys.size // tile.keys)
    pieces = _pieces(mask, queries, np.arange(1, num_rows) * tile.queries)
    return TileMap(
        num_rows=num_rows,
        num_columns=num_columns,
        computed=_computed(visible, pieces, keys, tile.keys),
        full=_full(visible, pieces, keys, tile.keys, num_columns),
    )


def tile_counts(
    mask: SequenceMask,
    *,
    edges: Integers,
    tile_keys: int,
    queries: Held | None = None,
    keys: Held | None = None,
    visible: VisibleKeys | None = None,
) -> Integers:
    """Counts the tiles with a visible pair in each row of tiles.

    Args:
        mask: Mask of the whole sequence.
        edges: Where rows of tiles begin, and the end of the last one; ascending, from 0.
        tile_keys: Keys of a tile.
        queries: Those between the edges, in this order; None is all.
        keys: Those that are there; None is all.
        visible: ``VisibleKeys.of(mask)``, if it is known.
    """
    visible = visible or VisibleKeys.of(mask)
    keys = keys or whole(mask.length)
    pieces = _pieces(mask, queries or whole(mask.length), edges[1:-1])
    alone = np.bincount(pieces.row, minlength=len(edges) - 1)[pieces.row] == 1
    computed = _computed(visible, pieces.select(~alone), keys, tile_keys)
    sizes = computed.stop - computed.start
    counts = np.bincount(computed.row, weights=sizes, minlength=len(edges) - 1).astype(np.int64)
    pure = pieces.select(alone)
    counts[pure.row] = _count_alone(visible, pure, keys, tile_keys, mask.num_segments)
    return counts


def visible_pairs(
    mask: SequenceMask, *, queries: Held | None = None, visible: VisibleKeys | None = None
) -> int:
    """Counts the pairs of a query and a key that it sees.

    Args:
        mask: Mask of the whole sequence.
        queries: Those that count; None is all.
        visible: ``VisibleKeys.of(mask)``, if it is known.
    """
    visible = visible or VisibleKeys.of(mask)
    pieces = _pieces(mask, queries or whole(mask.length), np.empty(0, dtype=np.int64))
    num_queries = pieces.stop - pieces.start
    seen = np.bincount(
        visible.seen.row,
        weights=visible.seen.stop - visible.seen.start,
        minlength=mask.num_segments,
    ).astype(np.int64)
    causal_from = visible.causal_from[pieces.segment]
    # A query at p sees p + 1 - causal_from of the keys that end with it.
    causal = num_queries * (pieces.start + 1 - causal_from) + num_queries * (num_queries - 1) // 2
    return int((num_queries * seen[pieces.segment] + np.where(causal_from < 0, 0, causal)).sum())


def needed(
    mask: SequenceMask, *, edges: Integers, queries: Held, visible: VisibleKeys | None = None
) -> np.ndarray:
    """Tells which blocks of keys have one that some of the queries see.

    Args:
        mask: Mask of the whole sequence.
        edges: Where blocks begin, and the end of the last one; ascending, from 0.
        queries: The queries.
        visible: ``VisibleKeys.of(mask)``, if it is known.

    Returns:
        A boolean for each block.
    """
    pieces = _pieces(mask, queries, np.empty(0, dtype=np.int64))
    seen = _seen(visible or VisibleKeys.of(mask), pieces, behind=pieces.stop)
    seen = merged(Ranges(np.zeros_like(seen.row), seen.start, seen.stop))
    first = np.searchsorted(edges, seen.start, side="right") - 1
    last = np.searchsorted(edges, seen.stop - 1, side="right") - 1
    changes = np.zeros(len(edges), dtype=np.int64)
    np.add.at(changes, first, 1)
    np.add.at(changes, last + 1, -1)
    return np.cumsum(changes)[:-1] > 0


class _Pieces(NamedTuple):
    """Consecutive queries of one segment in one row of tiles."""

    row: Integers
    segment: Integers
    start: Integers  # positions in the sequence
    stop: Integers

    def select(self, chosen: NDArray[np.bool_]) -> "_Pieces":
        return _Pieces(*(each[chosen] for each in self))


def _pieces(mask: SequenceMask, queries: Held, row_edges: Integers) -> _Pieces:
    """Cuts queries where a row of tiles, a segment or a stretch of positions ends.

    Args:
        mask: Mask of the sequence.
        queries: The queries.
        row_edges: Places among the queries where a row begins, but for the first one.
    """
    size = queries.size
    stretches = np.cumsum(queries.stop - queries.start)
    cuts = np.concatenate(([0], row_edges, stretches, queries.place(mask.stops)))
    cuts = np.unique(cuts[cuts < size])
    first = queries.position(cuts)
    return _Pieces(
        row=np.searchsorted(row_edges, cuts, side="right"),
        segment=np.searchsorted(mask.stops, first, side="right"),
        start=first,
        stop=first + np.diff(cuts, append=size),
    )


def _seen(visible: VisibleKeys, pieces: _Pieces, *, behind: Integers) -> Ranges:
    """Keys seen by queries of each piece.

    Args:
        visible: What each segment sees.
        pieces: The pieces; they are the rows of the result.
        behind: Behind the query of each piece that is asked: its causal keys end there.
    """
    number = np.arange(len(pieces.row))
    begins = np.searchsorted(visible.seen.row, pieces.segment, side="left")
    ends = np.searchsorted(visible.seen.row, pieces.segment, side="right")
    rows, index = counted_from(begins, ends - begins, number)
    causal_from = visible.causal_from[pieces.segment]
    causal = causal_from >= 0
    return Ranges(
        np.concatenate((rows, number[causal])),
        np.concatenate((visible.seen.start[index], causal_from[causal])),
        np.concatenate((visible.seen.stop[index], behind[causal])),
    )


def _computed(visible: VisibleKeys, pieces: _Pieces, keys: Held, tile_keys: int) -> Ranges:
    """Columns with a visible pair: the last query of a piece sees what any of it sees."""
    seen = _placed(_seen(visible, pieces, behind=pieces.stop), keys)
    seen = seen.select(seen.start < seen.stop)
    columns = Ranges(
        pieces.row[seen.row], seen.start // tile_keys, (seen.stop - 1) // tile_keys + 1
    )
    return merged(columns)


def _count_alone(
    visible: VisibleKeys, pieces: _Pieces, keys: Held, tile_keys: int, num_segments: int
) -> Integers:
    """Columns with a visible pair of pieces that are rows of their own.

    Rows of a long segment see the same keys but for the causal ones: those are counted once.
    """
    seen = _placed(visible.seen, keys)
    seen = seen.select(seen.start < seen.stop)
    columns = merged(Ranges(seen.row, seen.start // tile_keys, (seen.stop - 1) // tile_keys + 1))
    sizes = np.bincount(columns.row, weights=columns.stop - columns.start, minlength=num_segments)
    last = np.full(num_segments, -1, dtype=np.int64)
    last[columns.row] = columns.stop - 1
    causal_from = visible.causal_from[pieces.segment]
    start, stop = keys.place(causal_from), keys.place(pieces.stop)
    first = start // tile_keys
    causal = (stop - 1) // tile_keys + 1 - first - (last[pieces.segment] == first)
    some = (causal_from >= 0) & (start < stop)
    return sizes.astype(np.int64)[pieces.segment] + np.where(some, causal, 0)


def _full(
    visible: VisibleKeys, pieces: _Pieces, keys: Held, tile_keys: int, num_columns: int
) -> tuple[Integers, Integers]:
    """Tiles that are visible to every piece of their row: the first query of each sees least."""
    seen = _placed(_seen(visible, pieces, behind=pieces.start + 1), keys)
    covered = Ranges(pieces.row[seen.row], -(-seen.start // tile_keys), seen.stop // tile_keys)
    covered = covered.select(covered.start < covered.stop)
    rows, columns = covered.numbers()
    # Of one piece no two ranges touch, so it covers a tile once or not at all.
    tiles, times = np.unique(rows * num_columns + columns, return_counts=True)
    num_pieces = np.bincount(pieces.row)
    rows, columns = np.divmod(tiles, num_columns)
    everywhere = times == num_pieces[rows]
    return rows[everywhere], columns[everywhere]


def _placed(seen: Ranges, keys: Held) -> Ranges:
    """Ranges of places among the keys that are there, of ranges of positions."""
    return Ranges(seen.row, keys.place(seen.start), keys.place(seen.stop))
