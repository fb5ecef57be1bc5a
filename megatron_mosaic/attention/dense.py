"""Attention to some keys with the scores written out, exact: for hosts without a kernel."""

from dataclasses import dataclass
from typing import Any

import torch

from megatron_mosaic.attention.codes import SlotCodes, visible
from megatron_mosaic.attention.part import Part

_SCORES = 1 << 24
"""Scores that are held at a time: 64 MiB of them, in single precision."""


@dataclass(frozen=True, kw_only=True, eq=False)
class DenseKernel:
    """Computes a part in single precision, some queries at a time.

    Args:
        part: What it computes.
    """

    part: Part

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Computes attention to the keys of the part; see :class:`Kernel`."""
        return _Dense.apply(query, key, value, *self.part.codes, scale)


class _Dense(torch.autograd.Function):
    """Keeps no scores: backward computes them again, some queries at a time."""

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        query_codes: SlotCodes,
        key_codes: SlotCodes,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.codes, ctx.scale = (query_codes, key_codes), scale
        outputs, sums = [], []
        for slots in _chunks(query, key):
            scores = _scores(query[:, :, slots], key, query_codes.select(slots), key_codes, scale)
            lse = torch.logsumexp(scores, dim=-1)
            weights = _weights(scores, lse)
            outputs.append((weights @ value.float().unsqueeze(2)).flatten(1, 2))
            sums.append(lse.flatten(1, 2))
        output, lse = torch.cat(outputs, dim=2), torch.cat(sums, dim=2)
        ctx.save_for_backward(query, key, value, output, lse)
        return output, lse

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad_output, grad_lse = grads
        query, key, value, output, lse = ctx.saved_tensors
        query_codes, key_codes = ctx.codes
        groups = key.size(1)
        keys, values = key.float().unsqueeze(2), value.float().unsqueeze(2)
        grad_query, grad_key, grad_value = (
            torch.zeros_like(each, dtype=torch.float32) for each in (query, key, value)
        )
        row_grad = grad_lse - (grad_output * output).sum(dim=-1)
        for slots in _chunks(query, key):
            q = query[:, :, slots]
            scores = _scores(q, key, query_codes.select(slots), key_codes, ctx.scale)
            weights = _weights(scores, lse[:, :, slots].unflatten(1, (groups, -1)))
            grad_out = grad_output[:, :, slots].unflatten(1, (groups, -1))
            grad_value += (weights.mT @ grad_out).sum(dim=2)
            from_rows = row_grad[:, :, slots].unflatten(1, (groups, -1)).unsqueeze(-1)
            grad_scores = weights * (grad_out @ values.mT + from_rows) * ctx.scale
            grad_query[:, :, slots] = (grad_scores @ keys).flatten(1, 2)
            grad_key += (grad_scores.mT @ q.float().unflatten(1, (groups, -1))).sum(dim=2)
        return (
            grad_query.to(query.dtype),
            grad_key.to(key.dtype),
            grad_value.to(value.dtype),
            None,
            None,
            None,
        )


def _chunks(query: torch.Tensor, key: torch.Tensor) -> list[slice]:
    """Slots of the queries whose scores are computed together."""
    b, heads, num_queries, _ = query.shape
    step = max(1, _SCORES // (b * heads * max(1, key.size(2))))
    return [slice(first, first + step) for first in range(0, num_queries, step)]


def _scores(
    query: torch.Tensor,
    key: torch.Tensor,
    query_codes: SlotCodes,
    key_codes: SlotCodes,
    scale: float,
) -> torch.Tensor:
    """Scores ``[b, groups, heads of a group, queries, keys]``; ``-inf`` where nothing is seen."""
    seen = visible(
        SlotCodes(*(each[:, None, None, :, None] for each in query_codes)),
        SlotCodes(*(each[:, None, None, None, :] for each in key_codes)),
    )
    grouped = query.float().unflatten(1, (key.size(1), -1))
    scores = grouped @ key.float().unsqueeze(2).mT * scale
    return scores.masked_fill_(~seen, -torch.inf)


def _weights(scores: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
    """Exponentials of scores over their sum; zeros in rows that see nothing."""
    return torch.exp(scores - torch.where(lse == -torch.inf, 0, lse).unsqueeze(-1))
