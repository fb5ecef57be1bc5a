"""Arithmetic of a rank grid: positions, and the rank lists along its axes.

A grid is a named tuple of sizes, one for each axis, fastest first.
"""

from collections.abc import Collection, Sequence
from itertools import product
from math import prod
from typing import NamedTuple

from megatron_mosaic.errors import LayoutError


class Coordinates(NamedTuple):
    """Position of one rank in a module's grid, or the grid's sizes."""

    tp: int
    cp: int
    dp: int
    pp: int


class ExpertCoordinates(NamedTuple):
    """Position of one rank in the grid that splits a module's experts, or the grid's sizes."""

    expt_tp: int
    ep: int
    expt_dp: int
    pp: int


def position_of[Shape: (Coordinates, ExpertCoordinates)](index: int, shape: Shape) -> Shape:
    """Coordinates of the rank at ``index`` of a rank list."""
    position = []
    for size in shape:
        index, remainder = divmod(index, size)
        position.append(remainder)
    return type(shape)(*position)


def index_of[Shape: (Coordinates, ExpertCoordinates)](position: Shape, shape: Shape) -> int:
    """Index in the rank list; inverse of :func:`position_of`."""
    return sum(coordinate * prod(shape[:axis]) for axis, coordinate in enumerate(position))


def rank_lists(
    ranks: Sequence[int], shape: Coordinates | ExpertCoordinates, *, axes: Collection[str]
) -> list[tuple[int, ...]]:
    """Rank lists that differ only along ``axes``, as Megatron orders their members."""
    members: dict[tuple[int, ...], list[int]] = {}
    for index, position in enumerate(product(*(range(size) for size in reversed(shape)))):
        fixed = tuple(
            coordinate
            for axis, coordinate in zip(shape._fields, reversed(position), strict=True)
            if axis not in axes
        )
        members.setdefault(fixed, []).append(ranks[index])
    return [tuple(group) for group in members.values()]


def check_expert_grid(where: str, shape: Coordinates, *, expt_tp: int, ep: int) -> None:
    """Checks that the experts of a stage can be split over the stage's ranks.

    Args:
        where: Name of the module in messages.
        shape: Sizes of the module's grid.
        expt_tp: Ranks that split one expert.
        ep: Ranks, or sets of ``expt_tp`` ranks, that split the list of experts.

    Raises:
        LayoutError: A size is not positive, or the sizes do not divide a stage.
    """
    sizes = {"expert_tensor_parallel_size": expt_tp, "expert_model_parallel_size": ep}
    for field, size in sizes.items():
        if size < 1:
            raise LayoutError(f"{where}: {field}={size} must be >= 1; use 1 to switch it off")
    stage = shape.tp * shape.cp * shape.dp
    if stage % (expt_tp * ep):
        raise LayoutError(
            f"{where}: expert_tensor_parallel_size*expert_model_parallel_size={expt_tp}*{ep}="
            f"{expt_tp * ep} must divide the ranks of a stage, TP*CP*DP="
            f"{shape.tp}*{shape.cp}*{shape.dp}={stage}; change one of the sizes"
        )
