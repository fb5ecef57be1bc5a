"""Positions of a sequence that a rank holds."""

from typing import NamedTuple, Self

import numpy as np

from megatron_mosaic.tokens.ranges import Integers, Ranges, merged


class Held(NamedTuple):
    """Positions that a rank holds, ascending: consecutive stretches that do not touch."""

    start: Integers
    stop: Integers

    @classmethod
    def of(cls, start: Integers, stop: Integers) -> Self:
        """Joins stretches in any order; those that touch become one."""
        ranges = merged(Ranges(np.zeros_like(start), start, stop).select(start < stop))
        return cls(ranges.start, ranges.stop)

    @property
    def size(self) -> int:
        """Tokens held."""
        return int((self.stop - self.start).sum())

    def place(self, position: Integers) -> Integers:
        """Held positions before each position: where it is, if it is held."""
        before = np.concatenate(([0], np.cumsum(self.stop - self.start)))
        index = np.searchsorted(self.start, position, side="right")
        inside = np.minimum(position, np.append(self.stop, 0)[index - 1])
        return np.where(index > 0, before[index - 1] + inside - self.start[index - 1], 0)

    def position(self, place: Integers) -> Integers:
        """Position of the token at each place."""
        stops = np.cumsum(self.stop - self.start)
        index = np.searchsorted(stops, place, side="right")
        return self.stop[index] - (stops[index] - place)


def whole(length: int) -> Held:
    """All positions of a sequence."""
    return Held(np.array([0]), np.array([length]))
