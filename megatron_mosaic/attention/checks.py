"""Refuses what the operator cannot compute, before anything travels and alike on every rank."""

from collections.abc import Sequence
from typing import get_args

import torch

from megatron_mosaic.attention.choice import ExchangeWish
from megatron_mosaic.errors import LayoutError
from megatron_mosaic.tokens.assignment import TokenAssignment
from megatron_mosaic.tokens.mask import SequenceMask

MAX_HEAD_DIM = 256
MIN_HEAD_DIM_OF_KERNEL = 16  # torch._inductor, lowering of flex_attention
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    masks: Sequence[SequenceMask],
    assignments: Sequence[TokenAssignment] | None,
    cp: int,
    exchange: str,
    dropout: float,
) -> None:
    """Checks that tensors, masks and assignments fit each other.

    Raises:
        LayoutError: They do not, keys cannot travel in that way, or dropout is not 0.
    """
    if exchange not in get_args(ExchangeWish):
        raise LayoutError(
            f"attention: exchange={exchange} must be one of {', '.join(get_args(ExchangeWish))}; "
            f"choose how keys travel"
        )
    if dropout:
        raise LayoutError(
            f"attention: dropout={dropout} must be 0 with multimodal masks; "
            f"set --attention-dropout 0"
        )
    _check_tensors(query, key, value)
    s, b = query.shape[:2]
    if len(masks) != b:
        raise LayoutError(
            f"attention: masks={len(masks)} must be one for each of the {b} samples; "
            f"pass a mask for every sample of the microbatch"
        )
    if assignments is None and cp > 1:
        raise LayoutError(
            f"attention: assignments=None must say which of {cp} ranks keeps which tokens; "
            f"pass one for every sample"
        )
    if assignments is not None and len(assignments) != b:
        raise LayoutError(
            f"attention: assignments={len(assignments)} must be one for each of the {b} samples; "
            f"pass an assignment for every sample of the microbatch"
        )
    for sample, mask in enumerate(masks):
        _check_sample(mask, None if assignments is None else assignments[sample], slots=s, cp=cp)


def _check_tensors(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
    if query.dtype not in _DTYPES or not query.dtype == key.dtype == value.dtype:
        raise LayoutError(
            f"attention: dtype={query.dtype}, {key.dtype}, {value.dtype} must be one of bf16, fp16 "
            f"and fp32 for all; cast what differs"
        )
    heads, d = query.shape[2:]
    groups = key.size(2)
    if d > MAX_HEAD_DIM:
        raise LayoutError(
            f"attention: head_dim={d} must be <= {MAX_HEAD_DIM}; use more heads of fewer channels"
        )
    if d < MIN_HEAD_DIM_OF_KERNEL and query.device.type != "cpu":
        raise LayoutError(
            f"attention: head_dim={d} must be >= {MIN_HEAD_DIM_OF_KERNEL} on a GPU; "
            f"use fewer heads of more channels"
        )
    if heads % groups:
        raise LayoutError(
            f"attention: heads={heads} must be a multiple of query groups={groups}; "
            f"change --num-query-groups"
        )
    expected = (*query.shape[:2], groups, d)
    if key.shape != expected or value.shape != expected:
        raise LayoutError(
            f"attention: key={tuple(key.shape)}, value={tuple(value.shape)} must be {expected} as "
            f"the queries have it; pass keys of the same slots"
        )


def _check_sample(
    mask: SequenceMask, assignment: TokenAssignment | None, *, slots: int, cp: int
) -> None:
    if assignment is not None and assignment.cut.cp != cp:
        raise LayoutError(
            f"attention: cp={assignment.cut.cp} of an assignment must be the group's size {cp}; "
            f"assign tokens to the ranks that there are"
        )
    if assignment is not None and assignment.cut.length != mask.length:
        raise LayoutError(
            f"attention: length={assignment.cut.length} of an assignment must be its mask's "
            f"length {mask.length}; assign the tokens of the sequence"
        )
    tokens = mask.length if assignment is None else int(assignment.tokens.max())
    if tokens > slots:
        raise LayoutError(
            f"attention: slots={slots} must be >= {tokens} tokens of a rank; "
            f"pad to local_length of the assignment"
        )
