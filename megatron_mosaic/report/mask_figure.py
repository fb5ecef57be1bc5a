"""Draws the mask of a sequence, and which context-parallel rank computes which of its tiles."""

from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from megatron_mosaic.cost.context import rank_pairs
from megatron_mosaic.errors import LayoutError
from megatron_mosaic.layout.plan import Plan
from megatron_mosaic.model.spec import ModelSpec
from megatron_mosaic.model.workload import Workload, draw_masks
from megatron_mosaic.tokens.assign import assign
from megatron_mosaic.tokens.assignment import TokenAssignment
from megatron_mosaic.tokens.mask import SequenceMask
from megatron_mosaic.tokens.names import Method
from megatron_mosaic.tokens.tiles import KERNEL_TILE, Tile, tile_map

_STYLE: dict[Any, Any] = {"font.size": 9, "axes.titlesize": 10, "axes.titlelocation": "left"}
_SIDE = 4.4  # inches of a mask
_COLORS = "turbo"  # ranks that follow each other are told apart


def draw_mask(plan: Plan, model: ModelSpec, path: Path) -> None:
    """Draws a sequence of a model's workload as a plan assigns it, beside Megatron's zigzag.

    Args:
        plan: The plan.
        model: Its model, which tells what sequences look like.
        path: Picture to write, of the kind that the name ends with.

    Raises:
        LayoutError: The plan or the model has no multimodal mask, or each another one.
    """
    mask, methods = _sequence(plan, model), _methods(plan)
    cp = plan.language.context_parallel_size
    with mpl.rc_context(_STYLE):
        size = (_SIDE * len(methods), _SIDE + (1.6 if cp > 1 else 0.5))
        figure = Figure(figsize=size, layout="constrained")
        heights = [_SIDE, 1.1] if cp > 1 else [_SIDE]
        grid = figure.subplots(
            len(heights), len(methods), squeeze=False, height_ratios=heights, sharey="row"
        )
        for column, method in enumerate(methods):
            assignment = assign(mask, cp=cp, method=method, tile=KERNEL_TILE)
            _draw_tiles(grid[0, column], mask, assignment, name=method)
            if cp > 1:
                _draw_loads(grid[1, column], rank_pairs(mask, assignment))
        grid[0, 0].set_ylabel("queries, thousand tokens")
        figure.savefig(path, dpi=150)


def _sequence(plan: Plan, model: ModelSpec) -> SequenceMask:
    attention, workload = plan.language.attention, Workload.of(model)
    if attention is None or workload is None:
        where = "modules.language" if attention is None else f"model {model.name}: language"
        key = "attention" if attention is None else "mask"
        raise LayoutError(
            f"{where}: {key}=absent must name a mask to draw; plan for a model file with mask"
        )
    if attention.mask != workload.mask:
        raise LayoutError(
            f"modules.language: attention.mask={attention.mask} must be that of model "
            f"{model.name}={workload.mask}; name the model that the plan was made for"
        )
    return draw_masks(workload, count=1)[0]


def _methods(plan: Plan) -> list[Method]:
    """Assignments to draw: Megatron's, and the plan's."""
    attention = plan.language.attention
    if attention is None or plan.language.context_parallel_size == 1:
        return ["contiguous"]
    return list(dict.fromkeys(("zigzag", attention.tokens)))


def rank_of_tiles(mask: SequenceMask, assignment: TokenAssignment) -> NDArray[np.float64]:
    """Finds the context-parallel rank that computes each tile.

    Args:
        mask: Mask of the sequence.
        assignment: Who keeps which token.

    Returns:
        ``[rows, columns]`` of tiles that are cut from the whole sequence, as large as a block; NaN
        where no query sees a key.
    """
    size = min(assignment.cut.block, KERNEL_TILE.queries)
    tiles = tile_map(mask, tile=Tile(size, size))
    starts = np.arange(tiles.num_rows) * size
    piece = np.searchsorted(assignment.cut.edges, starts, side="right") - 1
    picture = np.full((tiles.num_rows, tiles.num_columns), np.nan)
    rows, columns = tiles.computed.numbers()
    picture[rows, columns] = assignment.owner[piece][rows]
    return picture


def _draw_tiles(axes: Axes, mask: SequenceMask, assignment: TokenAssignment, *, name: str) -> None:
    picture = rank_of_tiles(mask, assignment)
    thousands = mask.length / 1000
    axes.imshow(
        picture,
        cmap=_COLORS,
        vmin=-0.5,
        vmax=assignment.cut.cp - 0.5,
        extent=(0, thousands, thousands, 0),
        interpolation="nearest",
    )
    axes.set_xlabel("keys, thousand tokens")
    share = np.isfinite(picture).mean()
    axes.set_title(
        f"{name}: colours are ranks" if assignment.cut.cp > 1 else f"{share:.1%} of all tiles"
    )


def _draw_loads(axes: Axes, pairs: NDArray[np.float64]) -> None:
    """Draws what every rank computes, in shares of the mean."""
    shares, ranks = pairs / pairs.mean(), np.arange(len(pairs))
    axes.bar(ranks, shares, color=mpl.colormaps[_COLORS]((ranks + 0.5) / len(ranks)))
    axes.axhline(1, color="#333333", linewidth=0.8)
    axes.set_title(f"tiles of each rank over the mean: at most {shares.max():.2f}")
    axes.set_xlabel("context-parallel rank")
    axes.spines[["top", "right"]].set_visible(False)
