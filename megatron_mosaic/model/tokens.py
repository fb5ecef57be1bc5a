"""Numbers that differ from sample to sample, such as images of a sample or tokens of an image."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self


@dataclass(frozen=True, slots=True)
class Distribution:
    """Values and how often they occur.

    Args:
        values: Ascending, each once, >= 0.
        shares: Share of each value; they add up to 1.
    """

    values: tuple[float, ...]
    shares: tuple[float, ...]

    @classmethod
    def constant(cls, value: float) -> Self:
        """The same value always."""
        return cls((value,), (1.0,))

    @classmethod
    def of_weights(cls, values: Sequence[float], weights: Sequence[float]) -> Self:
        """Values with any positive weights, in any order."""
        total = sum(weights)
        pairs = sorted(zip(values, weights, strict=True))
        return cls(tuple(v for v, _ in pairs), tuple(w / total for _, w in pairs))

    @property
    def mean(self) -> float:
        """Expected value."""
        return sum(v * p for v, p in zip(self.values, self.shares, strict=True))

    @property
    def mean_square(self) -> float:
        """Expected square, which the cost of full attention grows with."""
        return sum(v * v * p for v, p in zip(self.values, self.shares, strict=True))

    @property
    def largest(self) -> float:
        """Largest value that occurs."""
        return self.values[-1]

    def percentile(self, share: float) -> float:
        """Smallest value that at least ``share`` of the occurrences do not exceed."""
        total = 0.0
        for value, part in zip(self.values, self.shares, strict=True):
            total += part
            if total >= share - 1e-12:
                return value
        return self.values[-1]
