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
from megatron_mosaic.tokens.mask import SequenceMask
from megatron_mosaic.tokens.ranges import Integers, Ranges, counted_from, merged
from megatron_mosaic.tokens.visible import VisibleKeys


class Tile(NamedTuple):
    """Queries and keys of one tile of a kernel."""

    queries: int
    keys: int


KERNEL_TILE = Tile(queries=128, keys=128)
"""Tiles of FlexAttention, whose block masks have blocks of 128; kernels compute them in pieces
that divide them. Assignments count them on every device: those of ranks, and of runs on other
machines, must agree.

Source: torch 2.11, torch/nn/attention/flex_attention.py, ``_DEFAULT_SPARSE_BLOCK_SIZE``.
"""


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
    simple = _simple_rows(visible, pieces)
    is_simple = np.zeros(len(edges) - 1, dtype=np.bool_)
    is_simple[simple.row] = True
    computed = _computed(visible, pieces.select(~is_simple[pieces.row]), keys, tile_keys)
    sizes = computed.stop - computed.start
    counts = np.bincount(computed.row, weights=sizes, minlength=len(edges) - 1).astype(np.int64)
    counts[simple.row] = _count_simple(visible, simple, keys, tile_keys)
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
    seen = seen[visible.row_of[pieces.segment]]
    return int((num_queries * seen + np.where(causal_from < 0, 0, causal)).sum())


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
    visible = visible or VisibleKeys.of(mask)
    pieces = _pieces(mask, queries, np.empty(0, dtype=np.int64))
    causal_from = visible.causal_from[pieces.segment]
    causal = causal_from >= 0
    is_seen = np.zeros(mask.num_segments, dtype=np.bool_)
    is_seen[visible.row_of[pieces.segment]] = True
    listed = visible.seen.select(is_seen[visible.seen.row])
    start = np.concatenate((listed.start, causal_from[causal]))
    stop = np.concatenate((listed.stop, pieces.stop[causal]))
    seen = merged(Ranges(np.zeros_like(start), start, stop))
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
    row_of = visible.row_of[pieces.segment]
    begins = np.searchsorted(visible.seen.row, row_of, side="left")
    ends = np.searchsorted(visible.seen.row, row_of, side="right")
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


class _SimpleRows(NamedTuple):
    """Rows of tiles that see one row of ``VisibleKeys.seen``, causal keys or both."""

    row: Integers
    seen_row: Integers  # -1 for none
    causal_from: Integers  # -1 for none
    causal_stop: Integers


def _simple_rows(visible: VisibleKeys, pieces: _Pieces) -> _SimpleRows:
    """Finds the rows of tiles whose columns can be counted without a list of them: nearly all."""
    begins = np.flatnonzero(np.diff(pieces.row, prepend=-1))
    sees = np.zeros(len(visible.row_of), dtype=np.bool_)
    sees[visible.seen.row] = True
    row_of = visible.row_of[pieces.segment]
    seen_row, only_row = _only(np.where(sees[row_of], row_of, -1), begins)
    causal = visible.causal_from[pieces.segment]
    causal_from, only_document = _only(causal, begins)
    causal_stop = np.maximum.reduceat(np.where(causal >= 0, pieces.stop, 0), begins)
    rows = _SimpleRows(pieces.row[begins], seen_row, causal_from, causal_stop)
    return _SimpleRows(*(each[only_row & only_document] for each in rows))


def _only(values: Integers, begins: Integers) -> tuple[Integers, NDArray[np.bool_]]:
    """The one value >= 0 of each stretch or -1, and whether there is no second one."""
    largest = np.maximum.reduceat(values, begins)
    least = np.minimum.reduceat(np.where(values < 0, np.iinfo(np.int64).max, values), begins)
    return largest, (largest < 0) | (least == largest)


def _count_simple(visible: VisibleKeys, rows: _SimpleRows, keys: Held, tile_keys: int) -> Integers:
    """Columns with a visible pair of simple rows: the seen ones outside of the causal ones too."""
    start, stop = keys.place(rows.causal_from), keys.place(rows.causal_stop)
    some = (rows.causal_from >= 0) & (start < stop)
    first = np.where(some, start // tile_keys, 0)
    behind = np.where(some, (stop - 1) // tile_keys + 1, 0)
    seen = _placed(visible.seen, keys)
    seen = seen.select(seen.start < seen.stop)
    columns = merged(Ranges(seen.row, seen.start // tile_keys, (seen.stop - 1) // tile_keys + 1))
    end = np.full(len(rows.row), -(-keys.size // tile_keys))
    before, within, total = (
        _columns_before(columns, rows.seen_row, each) for each in (first, behind, end)
    )
    return behind - first + total - (within - before)


def _columns_before(columns: Ranges, row: Integers, column: Integers) -> Integers:
    """Counts the columns of a row that are before a column; a row below 0 has none."""
    if not len(columns.row):
        return np.zeros(len(row), dtype=np.int64)
    sizes = columns.stop - columns.start
    before = np.cumsum(sizes) - sizes
    stride = int(max(columns.stop.max(), column.max(initial=0))) + 1
    index = (
        np.searchsorted(columns.row * stride + columns.start, row * stride + column, "right") - 1
    )
    there = (index >= 0) & (columns.row[index] == row)
    of_row = before[np.searchsorted(columns.row, row[there])]
    index, counts = index[there], np.zeros(len(row), dtype=np.int64)
    reached = np.minimum(column[there] - columns.start[index], sizes[index])
    counts[there] = before[index] - of_row + reached
    return counts


def _full(
    visible: VisibleKeys, pieces: _Pieces, keys: Held, tile_keys: int, num_columns: int
) -> tuple[Integers, Integers]:
    """Tiles that are visible to every piece of their row: the first query of each sees least."""
    seen = _placed(_seen(visible, pieces, behind=pieces.start + 1), keys)
    # What lies between two ranges may not be held: then they touch, and a tile may have of both.
    seen = merged(seen.select(seen.start < seen.stop))
    covered = Ranges(pieces.row[seen.row], -(-seen.start // tile_keys), seen.stop // tile_keys)
    covered = covered.select(covered.start < covered.stop)
    rows, columns = covered.numbers()
    # So no two ranges of a piece touch, and it covers a tile once or not at all.
    tiles, times = np.unique(rows * num_columns + columns, return_counts=True)
    num_pieces = np.bincount(pieces.row)
    rows, columns = np.divmod(tiles, num_columns)
    everywhere = times == num_pieces[rows]
    return rows[everywhere], columns[everywhere]


def _placed(seen: Ranges, keys: Held) -> Ranges:
    """Ranges of places among the keys that are there, of ranges of positions."""
    return Ranges(seen.row, keys.place(seen.start), keys.place(seen.stop))
