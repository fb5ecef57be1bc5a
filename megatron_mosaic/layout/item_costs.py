"""What an item of an encoder costs, such as an image, from its rows."""

from dataclasses import dataclass

Owners = tuple[tuple[int, ...], ...]
"""Data-parallel rank that runs each item, by sample of a task and item of the sample."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ItemCost:
    """Sizes of an encoder's items and the operations behind them.

    Args:
        item_rows: Boundary rows of an item, where all have as many and a sample has several; None
            where the rows of a sample are one item, of any size.
        row_flops: Operations of a forward pass for each row, in linear layers.
        pair_flops: Those for each pair of rows of an item, in scores and weighted values.
    """

    item_rows: int | None = None
    row_flops: float
    pair_flops: float

    def sizes(self, num_rows: int) -> tuple[int, ...]:
        """Rows of every item of a sample.

        Args:
            num_rows: Rows of the sample; without any it has no item.
        """
        if self.item_rows is not None:
            return (self.item_rows,) * (num_rows // self.item_rows)
        return (num_rows,) if num_rows else ()

    def flops(self, rows: int) -> float:
        """Operations of a forward pass of one item, whose tokens all see each other.

        A backward pass does one or two times as many, for every item alike, so it changes no
        share.
        """
        return rows * (self.row_flops + rows * self.pair_flops)
