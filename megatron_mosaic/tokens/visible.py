"""The keys that each segment of a mask sees, as intervals of positions."""

from dataclasses import dataclass
from typing import NamedTuple, Self

import numpy as np

from megatron_mosaic.tokens.mask import (
    NO_DOCUMENT,
    NO_GROUP,
    SequenceMask,
)
from megatron_mosaic.tokens.ranges import Integers, Ranges, counted_from, merged


@dataclass(frozen=True, kw_only=True, eq=False)
class VisibleKeys:
    """What the queries of each segment see.

    A query of segment ``i`` at position ``p`` sees the keys of row ``row_of[i]`` of ``seen`` and,
    if ``causal_from[i] >= 0``, those from there to ``p``. None of these touch each other.

    Args:
        seen: Intervals of positions by row, all of which every query of its segments sees.
        row_of: Row of each segment: its own number, or that of the first segment of its group if
            members see nothing else. A group of many images is listed once.
        causal_from: First of the keys that end with the query itself; -1 where there are none.
    """

    seen: Ranges
    row_of: Integers
    causal_from: Integers

    @classmethod
    def of(cls, mask: SequenceMask) -> Self:
        """Derives the intervals from the rule of a mask."""
        documents = _Documents.of(mask)
        row_of, of_groups = _by_group(mask)
        found = (
            _plain(mask, documents),
            _by_class(mask, documents),
            of_groups,
            _own(mask),
        )
        rows, starts, stops = (np.concatenate(column) for column in zip(*found, strict=True))
        ranges = merged(Ranges(rows, starts, stops))
        # Nothing that causal queries see lies behind them: what reaches their own segment's end
        # is what ends with the query.
        causal = (mask.group[ranges.row] == NO_GROUP) & (ranges.stop == mask.stops[ranges.row])
        causal_from = np.full(mask.num_segments, -1, dtype=np.int64)
        causal_from[ranges.row[causal]] = ranges.start[causal]
        return cls(seen=ranges.select(~causal), row_of=row_of, causal_from=causal_from)


class _Documents(NamedTuple):
    """Of every segment: what is known of its document."""

    first: Integers  # its first segment
    plain: Integers  # whether the segment sees all that is before it in the document

    @classmethod
    def of(cls, mask: SequenceMask) -> Self:
        number = np.arange(mask.num_segments)
        real = mask.document != NO_DOCUMENT
        if not real.any():
            return cls(number, np.zeros(mask.num_segments, dtype=np.int64))
        own = number[real]
        begins = np.flatnonzero(np.diff(mask.document[real], prepend=-2))
        index = np.cumsum(np.diff(mask.document[real], prepend=-2) != 0) - 1
        shown = np.bitwise_or.reduceat(mask.shown[real], begins)[index]
        first = number.copy()
        first[real] = own[begins][index]
        gaps = np.cumsum(~real)
        plain = np.zeros(mask.num_segments, dtype=np.int64)
        shown_at_all = np.logical_and.reduceat(mask.shown[real] != 0, begins)[index]
        everything = ((mask.sees[real] & shown) == shown) & shown_at_all
        plain[real] = everything & (gaps[own] == gaps[first[real]])
        return cls(first, plain)


def _plain(mask: SequenceMask, documents: _Documents) -> Ranges:
    """Everything before the segment, where that is what it sees."""
    rows = np.flatnonzero(documents.plain & (documents.first < np.arange(mask.num_segments)))
    return Ranges(rows, mask.starts[documents.first[rows]], mask.starts[rows])


def _by_class(mask: SequenceMask, documents: _Documents) -> Ranges:
    """Segments before each one that it sees by their class, where it does not see all."""
    number = np.arange(mask.num_segments)
    rows = np.flatnonzero((documents.plain == 0) & (mask.sees != 0) & (documents.first < number))
    rows, others = counted_from(documents.first[rows], number[rows] - documents.first[rows], rows)
    seen = (mask.sees[rows] & mask.shown[others] != 0) & (mask.document[others] != NO_DOCUMENT)
    rows, others = rows[seen], others[seen]
    return Ranges(rows, mask.starts[others], mask.stops[others])


def _by_group(mask: SequenceMask) -> tuple[Integers, Ranges]:
    """Segments of the same group of the same document, the segment itself among them.

    Returns:
        The row of each segment, and the ranges of each row that is in a group.
    """
    row_of = np.arange(mask.num_segments)
    grouped = np.flatnonzero((mask.group != NO_GROUP) & (mask.document != NO_DOCUMENT))
    order = grouped[np.lexsort((grouped, mask.group[grouped], mask.document[grouped]))]
    if not len(order):
        return row_of, Ranges.none()
    names = np.stack((mask.document[order], mask.group[order]))
    begins = np.flatnonzero(np.any(np.diff(names, prepend=-2), axis=0))
    sizes = np.diff(begins, append=len(order))
    group = np.repeat(np.arange(len(begins)), sizes)
    # The first member with nothing but its group stands for all such members.
    alone = mask.sees[order] == 0
    leader = np.minimum.reduceat(np.where(alone, order, mask.num_segments), begins)[group]
    row_of[order] = np.where(alone, leader, order)
    listed = row_of[order] == order
    rows, members = counted_from(begins[group][listed], sizes[group][listed], order[listed])
    others = order[members]
    return row_of, Ranges(rows, mask.starts[others], mask.stops[others])


def _own(mask: SequenceMask) -> Ranges:
    """Causal segments themselves, where they see their own class."""
    seen = (mask.sees & mask.shown != 0) & (mask.group == NO_GROUP)
    rows = np.flatnonzero(seen & (mask.document != NO_DOCUMENT))
    return Ranges(rows, mask.starts[rows], mask.stops[rows])
