"""Batches under multimodal masks, whole and in the parts that ranks keep."""

from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F

from megatron_mosaic.tokens.assign import assign
from megatron_mosaic.tokens.assignment import TokenAssignment
from megatron_mosaic.tokens.mask import (
    EVERYTHING,
    NO_GROUP,
    TEXT,
    Segment,
    SequenceMask,
    dense,
    padding,
)
from megatron_mosaic.tokens.names import Method
from megatron_mosaic.tokens.presets import Item, Preset, preset_mask
from megatron_mosaic.tokens.tiles import KERNEL_TILE

PRESETS: tuple[Preset, ...] = (
    "causal",
    "prefix_lm",
    "encoder_prepended",
    "encoder_embedded",
    "multimodal_packed",
)
ITEMS = {
    57: [],
    # At the start, back to back, and at the end.
    283: [Item(0, 40), Item(40, 90), Item(90, 91), Item(243, 283)],
    # 63 of them, one group each.
    1000: [Item(first, first + 9) for first in range(3, 948, 15)],
    2176: [Item(100, 600), Item(700, 1300), Item(1300, 1301)],
}
DOCUMENT_STOPS = {57: [10, 57], 283: [91, 230, 283], 1000: [498, 992], 2176: [650, 1500, 2000]}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One batch: shapes, masks, and how its tokens are assigned.

    With a seed, masks are such as no preset makes.
    """

    preset: Preset = "causal"
    seed: int | None = None
    length: int
    method: Method = "balanced"
    heads: int = 2
    groups: int = 1
    head_dim: int = 16
    spare_slots: int = 0
    dtype: torch.dtype = torch.float32
    exchange: str = "blocks"

    def masks(self) -> list[SequenceMask]:
        """Two samples: with items, and with other ones and padding."""
        if self.seed is not None:
            generator = np.random.default_rng(self.seed)
            return [random_mask(generator, self.length) for _ in range(2)]
        return [
            self._mask(ITEMS.get(self.length, []), self.length),
            self._mask([Item(0, self.length // 3)], self.length - self.length // 5),
        ]

    def _mask(self, items, real):
        if self.preset == "encoder_prepended":  # items come first
            items = [Item(0, items[0].stop), *items[1:3]] if items else []
            ends = [0, *(item.stop for item in items)]
            items = [Item(ends[i], item.stop) for i, item in enumerate(items)]
        stops = [real]
        if self.preset == "multimodal_packed" and real == self.length:
            stops = DOCUMENT_STOPS[self.length]
            items = [
                item
                for item in items
                if any(a <= item.start and item.stop <= b for a, b in pairwise([0, *stops]))
            ]
        return preset_mask(self.preset, length=self.length, items=items, document_stops=stops)

    def assignments(self, cp) -> list[TokenAssignment]:
        """One for each sample."""
        return [assign(mask, cp=cp, method=self.method, tile=KERNEL_TILE) for mask in self.masks()]

    def slots(self, cp) -> int:
        """Slots of every rank."""
        assignments = self.assignments(cp)
        return max(each.local_length() for each in assignments) + self.spare_slots

    def tensors(self) -> list[torch.Tensor]:
        """Queries, keys, values and the gradient of the output, ``[length, 2, heads, d]``."""
        generator = torch.Generator().manual_seed(self.length)
        heads = (self.heads, self.groups, self.groups, self.heads)
        return [
            torch.randn(self.length, 2, num, self.head_dim, generator=generator).to(self.dtype)
            for num in heads
        ]

    def local(self, whole, rank, cp) -> torch.Tensor:
        """The part of a tensor that a rank keeps; padding is no zeros."""
        local = torch.full((self.slots(cp), *whole.shape[1:]), 7.0, dtype=whole.dtype)
        for sample, positions in enumerate(self.positions(rank, cp)):
            local[: len(positions), sample] = whole[positions, sample]
        return local

    def whole(self, locals_) -> torch.Tensor:
        """The tensor whose parts ranks have; asserts that their padding is zeros."""
        whole = torch.full((self.length, *locals_[0].shape[1:]), torch.nan, dtype=locals_[0].dtype)
        for rank, local in enumerate(locals_):
            for sample, positions in enumerate(self.positions(rank, len(locals_))):
                whole[positions, sample] = local[: len(positions), sample]
                assert not local[len(positions) :, sample].any()
        return whole

    def positions(self, rank, cp):
        """Positions that a rank keeps of each sample."""
        held = [each.held(rank) for each in self.assignments(cp)]
        return [each.position(np.arange(each.size)) for each in held]


def random_mask(generator, length) -> SequenceMask:
    """Segments of any kind and class, padding between them too."""
    document, left, segments = 0, length, []
    while left:
        size = min(int(generator.integers(1, 24)), left)
        left -= size
        document += int(generator.random() < 0.2)
        if generator.random() < 0.1:
            segments.append(padding(size))
            continue
        group = int(generator.choice([NO_GROUP, NO_GROUP, 0, 1]))
        shown = int(generator.choice([TEXT, 2, 4, TEXT | 2]))
        sees = int(generator.choice([0, TEXT, 6, EVERYTHING]))
        segments.append(Segment(size, document, group, shown, sees))
    return SequenceMask.of(segments)


@cache
def reference(case: Case) -> list[torch.Tensor]:
    """Output and gradients in one process with a dense mask, in double precision."""
    seen = torch.stack([torch.from_numpy(dense(mask)) for mask in case.masks()])[:, None]
    *tensors, grad = case.tensors()
    leaves = [each.double().requires_grad_() for each in tensors]
    query, key, value = (each.permute(1, 2, 0, 3) for each in leaves)
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=seen, enable_gqa=True)
    out = out.masked_fill(~seen.any(dim=-1, keepdim=True), 0).permute(2, 0, 1, 3)
    out.backward(grad.double())
    return [out.detach(), *(leaf.grad for leaf in leaves)]


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Of two tensors, relative in norm."""
    return float((found.double() - expected).norm() / expected.norm())
