"""Who keeps which positions of a sequence, as a table that is looked up."""

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import NamedTuple, Self

from megatron_mosaic.layout.rows import Interval
from megatron_mosaic.layout.sharding import SequenceSharding

Part = tuple[int, int]
"""Context- and tensor-parallel place of a rank."""


class Columns(NamedTuple):
    """Where stretches of positions start and stop, and who has them; ascending."""

    starts: Sequence[int]
    stops: Sequence[int]
    keys: Sequence[Part]


class ShardTable:
    """Finds who keeps which rows of a sample, from the positions where its rows belong.

    Args:
        starts: Where stretches of positions start, ascending.
        stops: Where they stop.
        keys: Who has them.
    """

    def __init__(
        self, *, starts: Sequence[int], stops: Sequence[int], keys: Sequence[Part]
    ) -> None:
        self._whole = Columns(starts, stops, keys)

    @classmethod
    def of(cls, sharding: SequenceSharding) -> Self:
        """Table of a split that is the same for all sequences."""
        table = sorted(
            (start, stop, (cp, tp))
            for cp in range(sharding.cp)
            for tp in range(sharding.tp)
            for start, stop in sharding.positions(cp=cp, tp=tp)
        )
        starts, stops, keys = (list(column) for column in zip(*table, strict=True))
        return cls(starts=starts, stops=stops, keys=keys)

    def columns(self, key: Part | None = None) -> Columns:
        """The table, or the part of it that one rank has."""
        return self._whole if key is None else self._of_one.get(key, Columns((), (), ()))

    @cached_property
    def _of_one(self) -> dict[Part, Columns]:
        of_one: defaultdict[Part, list[tuple[int, int, Part]]] = defaultdict(list)
        for row in zip(*self._whole, strict=True):
            of_one[row[2]].append(row)
        return {key: Columns(*zip(*rows, strict=True)) for key, rows in of_one.items()}


def add_rows(
    found: dict[Part, list[Interval]], columns: Columns, runs: Iterable[Interval], *, before: int
) -> None:
    """Adds rows of a sample to those that each rank keeps.

    Args:
        found: Rows by the place of the rank; only those that are in it already are looked for.
        columns: Who has which positions.
        runs: Positions of the rows.
        before: First row of the sample.
    """
    starts, stops, key_at = columns
    num = len(starts)
    for start, stop in runs:
        if start == stop:
            continue
        index, shift = bisect_right(stops, start), before - start
        while index < num and starts[index] < stop:
            first, last = max(start, starts[index]), min(stop, stops[index])
            found[key_at[index]].append(Interval(first + shift, last + shift))
            index += 1
        before += stop - start
