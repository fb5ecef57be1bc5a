"""What an item of an encoder costs, such as an image, from its rows."""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_mosaic.layout.rows import Interval

Owners = tuple[tuple[int, ...], ...]
"""Data-parallel rank that runs each item, by sample of a task and item of the sample."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ItemCost:
    """Sizes of an encoder's items and the operations behind them.

    Args:
        item_rows: Boundary rows of an item, where all have as many and a sample has several; None
            where each run of rows of a sample is one item, of any size.
        row_flops: Operations of a forward pass for each row, in linear layers.
        pair_flops: Those for each pair of rows of an item, in scores and weighted values.
    """

    item_rows: int | None = None
    row_flops: float
    pair_flops: float

    def sizes(self, runs: Sequence[Interval]) -> tuple[int, ...]:
        """Rows of every item of a sample.

        Args:
            runs: Where its rows belong; without any it has no item.
        """
        sizes = tuple(stop - start for start, stop in runs if stop > start)
        if self.item_rows is None:
            return sizes
        return (self.item_rows,) * (sum(sizes) // self.item_rows)

    def flops(self, rows: int) -> float:
        """Operations of a forward pass of one item, whose tokens all see each other.

        A backward pass does one or two times as many, for every item alike, so it changes no
        share.
        """
        return rows * (self.row_flops + rows * self.pair_flops)
