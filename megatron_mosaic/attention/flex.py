"""Attention to some keys by FlexAttention, which leaves out tiles in which nothing is seen."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import numpy as np
import torch
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from megatron_mosaic.attention.codes import SlotCodes
from megatron_mosaic.attention.part import Part
from megatron_mosaic.tokens.ranges import Integers
from megatron_mosaic.tokens.tiles import KERNEL_TILE


@dataclass(frozen=True, kw_only=True, eq=False)
class FlexKernel:
    """Computes a part with FlexAttention, which is compiled where that is fast.

    Args:
        part: What it computes.
    """

    part: Part

    @cached_property
    def block_mask(self) -> BlockMask:
        """The mask with its tiles: those all of which is seen need no mask."""
        return _block_mask(self.part)

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Computes attention to the keys of the part; see :class:`Kernel`."""
        output, aux = _compiled(query.device.type)(
            query,
            key,
            value,
            block_mask=self.block_mask,
            scale=scale,
            enable_gqa=query.size(1) != key.size(1),
            return_aux=AuxRequest(lse=True),
            # Few queries would be computed by a kernel for decoding, whose limits are others.
            kernel_options={"FORCE_USE_FLEX_ATTENTION": True},
        )
        return output, aux.lse


@cache
def _compiled(device_type: str) -> Callable[..., Any]:
    # Without compilation torch writes out all scores; on a host that is what there is.
    return flex_attention if device_type == "cpu" else torch.compile(flex_attention)


def _block_mask(part: Part) -> BlockMask:
    tiles = part.tiles(KERNEL_TILE)
    full = [each.full for each in tiles]
    partial = [_without(each.computed.numbers(), each.full, each.num_columns) for each in tiles]
    shape = (tiles[0].num_rows, tiles[0].num_columns)
    turned = (tiles[0].num_columns, tiles[0].num_rows)
    kv_num_blocks, kv_indices = _lists(partial, shape, part.device)
    full_kv_num_blocks, full_kv_indices = _lists(full, shape, part.device)
    partial, full = ([(column, row) for row, column in each] for each in (partial, full))
    q_num_blocks, q_indices = _lists(partial, turned, part.device)
    full_q_num_blocks, full_q_indices = _lists(full, turned, part.device)
    return BlockMask(
        seq_lengths=(part.query_slots, part.key_slots),
        kv_num_blocks=kv_num_blocks,
        kv_indices=kv_indices,
        full_kv_num_blocks=full_kv_num_blocks,
        full_kv_indices=full_kv_indices,
        q_num_blocks=q_num_blocks,
        q_indices=q_indices,
        full_q_num_blocks=full_q_num_blocks,
        full_q_indices=full_q_indices,
        BLOCK_SIZE=(KERNEL_TILE.queries, KERNEL_TILE.keys),
        mask_mod=mask_mod_of(*part.codes),
    )


def mask_mod_of(query: SlotCodes, key: SlotCodes) -> Callable[..., torch.Tensor]:
    """The rule as FlexAttention asks for it."""
    # Tensors and nothing else are closed over: a mask of other values is no new compilation.
    q_position, q_document, q_group, q_classes = query
    k_position, k_document, k_group, k_classes = key

    def mask_mod(
        b: torch.Tensor, h: torch.Tensor, q_slot: torch.Tensor, k_slot: torch.Tensor
    ) -> torch.Tensor:
        causal = (q_position[b, q_slot] >= k_position[b, k_slot]) & (
            (q_classes[b, q_slot] & k_classes[b, k_slot]) != 0
        )
        return (q_group[b, q_slot] == k_group[b, k_slot]) | (
            (q_document[b, q_slot] == k_document[b, k_slot]) & causal
        )

    return mask_mod


def _without(
    tiles: tuple[Integers, Integers], others: tuple[Integers, Integers], num_columns: int
) -> tuple[Integers, Integers]:
    """Tiles that are not among others."""
    number = tiles[0] * num_columns + tiles[1]
    kept = ~np.isin(number, others[0] * num_columns + others[1])
    return tiles[0][kept], tiles[1][kept]


def _lists(
    samples: Sequence[tuple[Integers, Integers]], shape: tuple[int, int], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Number of tiles of each row ``[b, 1, rows]``, and their columns ``[b, 1, rows, columns]``."""
    counts = np.zeros((len(samples), 1, shape[0]), dtype=np.int32)
    indices = np.zeros((len(samples), 1, *shape), dtype=np.int32)
    for sample, (rows, columns) in enumerate(samples):
        order = np.lexsort((columns, rows))
        rows, columns = rows[order], columns[order]
        counts[sample, 0] = np.bincount(rows, minlength=shape[0])
        first = np.cumsum(counts[sample, 0]) - counts[sample, 0]
        indices[sample, 0, rows, np.arange(len(rows)) - first[rows]] = columns
    return torch.from_numpy(counts).to(device), torch.from_numpy(indices).to(device)
