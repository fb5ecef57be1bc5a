"""Queries of a rank and some of the keys that they see: what one call of a kernel computes."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import torch

from megatron_mosaic.attention.codes import SlotCodes, slot_codes
from megatron_mosaic.tokens.held import Held
from megatron_mosaic.tokens.mask import SequenceMask
from megatron_mosaic.tokens.ranges import Ranges
from megatron_mosaic.tokens.tiles import Tile, TileMap, tile_map


@dataclass(frozen=True, kw_only=True, eq=False)
class Part:
    """Queries and keys of a batch, in the slots of their tensors.

    Args:
        masks: One for each sample.
        queries: Positions in the first slots of each sample; the slots behind them are padding.
        query_slots: Slots of the queries.
        keys: As of the queries.
        key_slots: Slots of the keys.
        device: Where the part is computed.
    """

    masks: Sequence[SequenceMask]
    queries: Sequence[Held]
    query_slots: int
    keys: Sequence[Held]
    key_slots: int
    device: torch.device

    @cached_property
    def codes(self) -> tuple[SlotCodes, SlotCodes]:
        """What decides who sees whom, of queries and of keys."""
        return slot_codes(
            self.masks,
            queries=self.queries,
            query_slots=self.query_slots,
            keys=self.keys,
            key_slots=self.key_slots,
            device=self.device,
        )

    def tiles(self, tile: Tile) -> list[TileMap]:
        """Tiles that a kernel computes, of each sample."""
        samples = zip(self.masks, self.queries, self.keys, strict=True)
        return [self._tiles(*sample, tile) for sample in samples]

    def _tiles(self, mask: SequenceMask, queries: Held, keys: Held, tile: Tile) -> TileMap:
        rows, columns = -(-self.query_slots // tile.queries), -(-self.key_slots // tile.keys)
        nothing = np.empty(0, dtype=np.int64)
        computed, full = Ranges.none(), (nothing, nothing)
        if queries.size and keys.size:
            found = tile_map(mask, tile=tile, queries=queries, keys=keys)
            computed = found.computed
            # Slots behind the queries see nothing, which a kernel finds out with the mask alone.
            padded = queries.size < self.query_slots
            whole = (found.full[0] + 1) * tile.queries * padded <= queries.size
            full = (found.full[0][whole], found.full[1][whole])
        return TileMap(num_rows=rows, num_columns=columns, computed=computed, full=full)


class Kernel(Protocol):
    """Computes one part."""

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Computes attention to the keys of the part, differentiably.

        Args:
            query: ``[b, heads, query slots, d]``.
            key: ``[b, groups, key slots, d]``.
            value: As the keys.
            scale: Of the scores.

        Returns:
            Output ``[b, heads, query slots, d]`` and logarithm of the sum of exponentials of the
            scores ``[b, heads, query slots]``; of queries that see nothing zeros and ``-inf``.
        """
        ...
