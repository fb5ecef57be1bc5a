"""Sets of consecutive rows, samples or positions, and their arithmetic."""

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple, Self


class Interval(NamedTuple):
    """Consecutive items ``[start, stop)``; empty if both are equal."""

    start: int
    stop: int

    @property
    def size(self) -> int:
        """Items in the interval."""
        return self.stop - self.start

    def clip(self, bounds: "Interval") -> "Interval":
        """Part of the interval inside ``bounds``; empty, at the nearer bound, if there is none."""
        start = min(max(self.start, bounds.start), bounds.stop)
        return Interval(start, max(start, min(self.stop, bounds.stop)))

    def shift(self, distance: int) -> "Interval":
        """The interval moved by a number of items."""
        return Interval(self.start + distance, self.stop + distance)


class Rows(tuple[Interval, ...]):
    """Rows of a tensor: ascending intervals that are not empty and do not touch.

    A rank that holds some rows of a tensor has them in this order, one after the other.
    """

    __slots__ = ()

    @classmethod
    def of(cls, intervals: Iterable[Interval]) -> Self:
        """Joins intervals in any order; those that touch or overlap become one."""
        return cls.of_sorted(sorted(interval for interval in intervals if interval.size))

    @classmethod
    def of_sorted(cls, intervals: Sequence[Interval]) -> Self:
        """Joins intervals that are ascending and not empty."""
        if len(intervals) < 2 or _are_apart(intervals):
            return cls(intervals)
        return cls(_merged(intervals))

    @property
    def size(self) -> int:
        """Number of rows."""
        return sum(interval.size for interval in self)

    def inside(self, bounds: Interval) -> Iterator[Interval]:
        """Yields the parts of the intervals inside ``bounds``, ascending."""
        first = bisect_right(self, bounds.start, key=lambda interval: interval.stop)
        for interval in self[first:]:
            if interval.start >= bounds.stop:
                return
            yield interval.clip(bounds)

    def numbers(self) -> Iterator[int]:
        """Yields the rows one by one."""
        for interval in self:
            yield from range(*interval)


class Places:
    """Finds rows in a tensor that holds some rows, one after the other.

    Args:
        rows: What the tensor holds.
    """

    def __init__(self, rows: Rows) -> None:
        self._rows = rows
        self._starts = [interval.start for interval in rows]
        self._before = list(accumulate((interval.size for interval in rows), initial=0))

    def find(self, row: int) -> int | None:
        """Place of a row in the tensor; None if it is not there."""
        index = bisect_right(self._starts, row) - 1
        if index < 0 or row >= self._rows[index].stop:
            return None
        return self._before[index] + row - self._rows[index].start

    def slice(self, interval: Interval) -> slice:
        """Places of consecutive rows, all of which are there."""
        start = self.find(interval.start)
        assert start is not None, f"rows {interval} are not among {self._rows}"
        return slice(start, start + interval.size)


def split_evenly(total: int, parts: int) -> tuple[Interval, ...]:
    """Splits ``total`` items into consecutive intervals whose sizes differ by one at most.

    Part ``i`` is ``[floor(i * total / parts), floor((i + 1) * total / parts))``, so parts are
    empty where there are fewer items than parts.
    """
    bounds = [part * total // parts for part in range(parts + 1)]
    return tuple(Interval(*pair) for pair in pairwise(bounds))


def _are_apart(intervals: Sequence[Interval]) -> bool:
    return all(before.stop < after.start for before, after in pairwise(intervals))


def _merged(intervals: Sequence[Interval]) -> Iterator[Interval]:
    start, stop = intervals[0]
    for interval in intervals:
        if interval.start <= stop:
            stop = max(stop, interval.stop)
        else:
            yield Interval(start, stop)
            start, stop = interval
    yield Interval(start, stop)
