"""Core attention of the language model under multimodal masks, on one rank or context-parallel.

Every sample of a microbatch has a mask of its own, and ranks keep tokens as it asks for. Both ride
through Megatron's layers as ``packed_seq_params``: Megatron hands that object to every layer and
into what a backward pass computes again, which may be when other microbatches are under way.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_mosaic.attention.operator import multimodal_attention
from megatron_mosaic.errors import PlanError
from megatron_mosaic.host.agreement import RankError
from megatron_mosaic.layout.attention import AttentionPlan
from megatron_mosaic.tokens.assignment import TokenAssignment
from megatron_mosaic.tokens.mask import SequenceMask


@dataclass(kw_only=True, eq=False)
class MaskedSequences(PackedSeqParams):
    """What attention and rotary embedding know of the samples of a microbatch.

    Its ``qkv_format`` is that of samples which are not packed: documents of a sample are told
    apart by its mask, and tensors stay ``[s, b, heads, d]``.

    Args:
        masks: Mask of every sample.
        assignments: Which context-parallel rank has which tokens of every sample; None without
            context parallelism.
        rotary_positions: Of the token in every slot of this rank's context-parallel part, counted
            from the beginning of its document ``[1, b, s]``, or along time, height and width for
            M-RoPE ``[3, b, s]``.
        num_positions: Tokens of a sample; all rotary positions are below.
    """

    qkv_format: str = "sbhd"
    masks: tuple[SequenceMask, ...]
    assignments: tuple[TokenAssignment, ...] | None
    rotary_positions: torch.Tensor
    num_positions: int


class MultimodalCoreAttention(torch.nn.Module):
    """Stands for Megatron's own core attention, or TransformerEngine's, in a layer spec.

    Args:
        config: The language model's.
        pg_collection: Its groups.
        softmax_scale: As upstream's; None is ``1 / sqrt(kv_channels)``.
        attention: What the plan says.
        others: What upstream's classes take beside these; masks come with the sequences.
    """

    def __init__(
        self,
        *,
        config: TransformerConfig,
        pg_collection: Any,
        softmax_scale: float | None = None,
        attention: AttentionPlan,
        **others: Any,
    ) -> None:
        super().__init__()
        assert config.kv_channels is not None
        self._scale = config.kv_channels**-0.5 if softmax_scale is None else softmax_scale
        self._group: dist.ProcessGroup | None = None
        if config.context_parallel_size > 1:
            self._group = pg_collection.cp
        self._attention = attention

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> torch.Tensor:
        """Computes the attention of this rank's queries.

        Args:
            query: Of this rank's tokens ``[s, b, heads, d]``.
            key: Of this rank's tokens ``[s, b, groups, d]``.
            value: As ``key``.
            attention_mask: Must be None.
            attn_mask_type: Ignored.
            attention_bias: Must be None.
            packed_seq_params: The microbatch's :class:`MaskedSequences`.

        Returns:
            ``[s, b, heads * d]``.

        Raises:
            RankError: The script gives a mask; on every rank of the group.

        Note:
            Collective over the context-parallel group, forward and backward.
        """
        assert isinstance(packed_seq_params, MaskedSequences), "a stage runs without its sequences"
        for name, given in (("attention_mask", attention_mask), ("attention_bias", attention_bias)):
            if given is not None:
                raise RankError(
                    f"script: {name}={list(given.shape)} must be None where the plan says "
                    f"language.attention, whose mask follows from the batch; return none from "
                    f"get_batch, or remove the key from the plan",
                    speaker=dist.get_rank(),
                )
        output = multimodal_attention(
            query,
            key,
            value,
            masks=packed_seq_params.masks,
            assignments=packed_seq_params.assignments,
            group=self._group,
            scale=self._scale,
            exchange=self._attention.keys,
        )
        return output.flatten(2)


def core_attention(attention: AttentionPlan) -> Callable[..., torch.nn.Module]:
    """Returns the constructor of the core attention that a plan asks for."""
    return partial(MultimodalCoreAttention, attention=attention)


def check_config(config: TransformerConfig) -> None:
    """Checks that the operator computes what a language model's config asks for.

    Args:
        config: The language model's.

    Raises:
        PlanError: It does not.
    """
    rules: tuple[tuple[str, Any, Any, str], ...] = (
        ("attention_dropout", config.attention_dropout, 0.0, "add --attention-dropout 0"),
        ("window_size", config.window_size, None, "use no sliding window"),
        ("softmax_type", config.softmax_type, "vanilla", "use Megatron's default"),
        ("qk_clip", config.qk_clip, False, "train without clipped logits"),
        ("multi_latent_attention", config.multi_latent_attention, False, "use another model"),
        ("mtp_num_layers", config.mtp_num_layers, None, "train without multi-token prediction"),
    )
    for name, value, legal, advice in rules:
        if value != legal:
            raise PlanError(
                f"modules.language: {name}={value} must be {legal} with attention; {advice}, or "
                f"remove the key attention"
            )
