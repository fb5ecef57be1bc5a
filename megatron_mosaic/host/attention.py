"""Core attention over sequences that a context-parallel group holds in parts.

Megatron leaves context parallelism to TransformerEngine. Where a layer spec names another core
attention, and in encoders, whose lengths TransformerEngine does not split, every rank gathers the
keys and values of the whole sequence and computes its own queries.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import ModuleSpec

from megatron_mosaic.errors import HostError
from megatron_mosaic.host.agreement import RankError


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitTokens:
    """Which tokens of a sequence each rank of a context-parallel group holds.

    Args:
        group: The group.
        positions: Positions of every rank's tokens, in the order in which it holds them; as many
            on every rank.
        length: Length of the sequence. Positions from there on are padding, which nobody sees.
    """

    group: dist.ProcessGroup
    positions: tuple[tuple[int, ...], ...]
    length: int

    def order(self) -> list[int]:
        """Places in the gathered tensor of the positions 0, 1, ... of the sequence."""
        gathered = [position for own in self.positions for position in own]
        places = {position: place for place, position in enumerate(gathered)}
        return [places[position] for position in range(self.length)]

    def own(self) -> tuple[int, ...]:
        """Positions of this rank's tokens."""
        return self.positions[self.group.rank()]


class GatheredKeyValues:
    """Lets a core attention see the keys and values of the whole sequence; mixed into its class.

    Args:
        split: Which rank holds which tokens.
        config: The module's; the attention itself is built as if it were alone.
        attn_mask_type: ``causal`` or ``no_mask``, or the padded kinds of both.
        others: What the attention's class takes.
    """

    def __init__(
        self, *, split: SplitTokens, config: Any, attn_mask_type: AttnMaskType, **others: Any
    ) -> None:
        if getattr(config, "window_size", None) is not None:
            raise HostError(
                f"arguments: window_size={config.window_size} must be None with context "
                f"parallelism in a local layer spec; use TransformerEngine's"
            )
        alone = copy.copy(config)
        alone.context_parallel_size = 1
        # The mask is ours: what a rank may see does not depend on its tokens' places alone.
        super().__init__(config=alone, attn_mask_type=AttnMaskType.padding, **others)  # type: ignore[call-arg]
        self._split = split
        self._causal = attn_mask_type in (AttnMaskType.causal, AttnMaskType.padding_causal)
        self._tables = cache(self._make_tables)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        **others: Any,
    ) -> torch.Tensor:
        """Computes the attention of this rank's queries.

        Args:
            query: Of this rank's tokens ``[s, b, heads, d]``.
            key: Of this rank's tokens ``[s, b, groups, d]``.
            value: As ``key``.
            attention_mask: Must be None.
            attn_mask_type: Ignored: the layer's own is used.
            others: What the attention's class takes.

        Raises:
            RankError: The script gives a mask; on every rank of the group.

        Note:
            Collective over the group, forward and backward.
        """
        if attention_mask is not None:
            raise RankError(
                f"script: attention_mask={list(attention_mask.shape)} must be None with context "
                f"parallelism in a local layer spec, where every rank masks what its own tokens "
                f"may not see; return no mask from get_batch",
                speaker=dist.get_rank(),
            )
        order, mask = self._tables(query.device)
        return super().forward(  # type: ignore[misc]
            query, self._whole(key, order), self._whole(value, order), mask, **others
        )

    def _whole(self, own: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
        gathered = gather_from_sequence_parallel_region(own, group=self._split.group)
        return gathered.index_select(0, order)

    def _make_tables(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor | None]:
        order = torch.tensor(self._split.order(), device=device)
        if not self._causal:
            return order, None
        own = torch.tensor(self._split.own(), device=device)
        later = torch.arange(self._split.length, device=device) > own[:, None]
        return order, later[None, None]


class GatheredDotProductAttention(GatheredKeyValues, DotProductAttention):
    """Megatron's own attention on gathered keys and values."""


def gathering(attention: type, split: SplitTokens) -> Callable[..., torch.nn.Module]:
    """Returns the constructor of a core attention that gathers keys and values.

    Args:
        attention: Class of the core attention.
        split: Which rank holds which tokens.
    """
    mixed: Any = GatheredDotProductAttention
    if attention is not DotProductAttention:
        mixed = type(f"Gathered{attention.__name__}", (GatheredKeyValues, attention), {})
    return partial(mixed, split=split)


def with_core_attention(spec: ModuleSpec, change: Callable[[Any], Any]) -> ModuleSpec:
    """Copies the spec of a transformer layer with another core attention.

    Args:
        spec: Spec of a layer, or of a block of layers.
        change: Takes the core attention's class and returns what builds it.
    """
    spec = copy.deepcopy(spec)
    layers = getattr(spec, "layer_specs", None) or getattr(spec.submodules, "layer_specs", None)
    for layer in layers or [spec]:
        submodules = layer.submodules.self_attention.submodules
        submodules.core_attention = change(submodules.core_attention)
    return spec
