"""Sets of consecutive numbers by row, as arrays: many at once, without a loop."""

from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]


class Ranges(NamedTuple):
    """Ranges ``[start, stop)`` of several rows; one entry of each array for a range."""

    row: Integers
    start: Integers
    stop: Integers

    @classmethod
    def none(cls) -> Self:
        """No range at all."""
        empty = np.empty(0, dtype=np.int64)
        return cls(empty, empty, empty)

    def select(self, chosen: NDArray[np.bool_] | Integers) -> "Ranges":
        """Some of the ranges."""
        return Ranges(self.row[chosen], self.start[chosen], self.stop[chosen])

    def numbers(self) -> tuple[Integers, Integers]:
        """Row and value of every number in the ranges."""
        return counted_from(self.start, self.stop - self.start, self.row)


def counted_from(first: Integers, count: Integers, row: Integers) -> tuple[Integers, Integers]:
    """Repeats rows, and counts up from a first number in each.

    Args:
        first: First number of each entry.
        count: Numbers of each entry, >= 0.
        row: Row of each entry.

    Returns:
        Rows and numbers, ``sum(count)`` of both.
    """
    rows = np.repeat(row, count)
    before = np.repeat(np.cumsum(count) - count, count)
    return rows, np.repeat(first, count) + np.arange(len(rows)) - before


def merged(ranges: Ranges) -> Ranges:
    """Joins the ranges of a row that touch or overlap; sorts them by row and start."""
    if not len(ranges.row):
        return ranges
    # One number line for all rows: those of the next row begin beyond everything of this one.
    stride = int(ranges.stop.max()) + 2
    start = ranges.row * stride + ranges.start
    order = np.argsort(start, kind="stable")
    row, start, stop = ranges.row[order], start[order], (ranges.row * stride + ranges.stop)[order]
    reached = np.maximum.accumulate(stop)
    begins = np.flatnonzero(np.concatenate(([True], start[1:] > reached[:-1])))
    ends = np.concatenate((begins[1:] - 1, [len(start) - 1]))
    row = row[begins]
    return Ranges(row, start[begins] - row * stride, reached[ends] - row * stride)
