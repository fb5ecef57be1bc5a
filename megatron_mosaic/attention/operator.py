"""Attention under multimodal masks on the ranks of a context-parallel group.

Queries stay where they are. The keys and values that a rank's queries see come from the other
ranks while the rank computes attention to its own; gradients go back while it computes those of
its own:

    forward     send keys | own keys            | wait | received keys  | merge
    backward    merge     | received keys       | send gradients | own keys | wait, add
"""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.graph import saved_tensors_hooks

from megatron_mosaic.attention.checks import check_attention
from megatron_mosaic.attention.choice import ExchangeWish
from megatron_mosaic.attention.exchange import PendingRows, post_gradients, post_keys
from megatron_mosaic.attention.merge import Computed, merge, merge_grads
from megatron_mosaic.attention.part import Kernel
from megatron_mosaic.attention.plan import Received, rank_plan
from megatron_mosaic.cost.collectives import Group
from megatron_mosaic.tokens.assignment import TokenAssignment
from megatron_mosaic.tokens.mask import SequenceMask


def multimodal_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    masks: Sequence[SequenceMask],
    assignments: Sequence[TokenAssignment] | None = None,
    group: dist.ProcessGroup | None = None,
    scale: float | None = None,
    exchange: ExchangeWish = "auto",
    links: Group | None = None,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Computes attention of the tokens that this rank keeps to all tokens that they see.

    A rank has its tokens in the order of the sequence. Slots behind them are padding: their
    output and gradients are zero, and nothing sees them; so it is with padding of the sequence.

    Args:
        query: ``[s, b, heads, d]``, s slots; bf16, fp16 or fp32.
        key: ``[s, b, groups, d]``, as many groups as divide the heads.
        value: As the keys.
        masks: One for each sample.
        assignments: Who keeps which tokens of each sample; None is a group of one rank.
        group: The context-parallel group; None is a group of one rank.
        scale: Of the scores; None is ``1 / sqrt(d)``.
        exchange: How keys travel between ranks; ``auto`` is what is cheaper.
        links: Of the group, which ``auto`` goes by where they are known.
        dropout: Of the weights.

    Returns:
        ``[s, b, heads, d]`` in the dtype of the queries, equal in every run.

    Raises:
        LayoutError: Tensors, masks and assignments do not fit each other, or dropout is not 0.

    Note:
        Collective over the group, forward and backward: every rank of it calls this with the same
        masks, assignments and shapes. Backward runs once: it frees what forward kept.
    """
    size = 1 if group is None else group.size()
    check_attention(
        query,
        key,
        value,
        masks=masks,
        assignments=assignments,
        cp=size,
        exchange=exchange,
        dropout=dropout,
    )
    plan = rank_plan(
        masks,
        assignments,
        rank=0 if group is None else group.rank(),
        slots=query.size(0),
        device=query.device,
        wish=exchange,
        row_bytes=2 * key[0, 0].numel() * key.element_size(),
        links=links,
    )
    scale = 1 / math.sqrt(query.size(-1)) if scale is None else scale
    if plan.received is None:
        output, _ = _attend(plan.own, query, key, value, scale)
        return output.to(query.dtype).permute(2, 0, 1, 3)
    assert group is not None, "nothing travels in a group of one rank"
    differentiable = torch.is_grad_enabled() and any(
        each.requires_grad for each in (query, key, value)
    )
    return _Exchanged.apply(
        query, key, value, plan.own, plan.received, group, scale, differentiable
    )


class _Exchanged(torch.autograd.Function):
    """Attention to own and to received keys.

    The graphs of both are made in forward and kept for backward, which decides itself when each of
    them runs.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        own: Kernel,
        received: Received,
        group: dist.ProcessGroup,
        scale: float,
        differentiable: bool,
    ) -> torch.Tensor:
        s, b = key.shape[:2]
        rows = torch.cat([key, value], dim=2).view(s * b, -1)
        pending = post_keys(rows, received, group=group)
        leaves = tuple(t.detach().requires_grad_(differentiable) for t in (query, key, value))
        q, k, v = leaves
        with torch.set_grad_enabled(differentiable), _kept_as_they_are():
            parts = [_attend(own, q, k, v, scale)]
            arrived = _place(pending.wait(), received, b).unflatten(-1, (2, *key.shape[2:]))
            arrived.requires_grad_(differentiable)
            if received.kernel is not None:
                keys, values = arrived.unbind(2)
                parts.append(_attend(received.kernel, q, keys, values, scale))
        if differentiable:
            ctx.kept = (leaves, arrived, parts, received, group)
        output = merge([(out.detach(), lse.detach()) for out, lse in parts])
        return output.to(query.dtype).permute(2, 0, 1, 3)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        assert ctx.kept is not None, "backward ran before, and freed what forward kept"
        # Memory is free as soon as both graphs have run, as it is with torch's own functions.
        (leaves, arrived, parts, received, group), ctx.kept = ctx.kept, None
        own, *others = zip(parts, merge_grads(grads[0].permute(1, 2, 0, 3), parts), strict=True)
        grad_query = None
        grad_arrived = torch.zeros_like(arrived)
        if others:
            grad_query, grad_arrived = _grads(*others[0], (leaves[0], arrived))
        grad_rows = grad_arrived.flatten(0, 1).flatten(1)[received.receive_rows]
        pending = post_gradients(grad_rows, received, group=group)
        own_query, *own_keys = _grads(*own, leaves)
        grad_query = own_query if grad_query is None else grad_query + own_query
        grad_key, grad_value = _add_returned(own_keys, pending, received)
        return grad_query, grad_key, grad_value, None, None, None, None, None


def _kept_as_they_are() -> AbstractContextManager[None]:
    """Hides graphs made inside from a checkpoint around them that is not reentrant.

    It would run forward again for each of the two graphs, and with it the exchange, when that
    graph runs: ranks do so in unlike order, and one that receives no keys has one graph alone.
    Such a checkpoint frees nothing in here; Megatron's are reentrant, and free all.
    """
    return saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)


def _attend(
    kernel: Kernel, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
) -> Computed:
    """Attends with tensors ``[s, b, heads, d]``; kernels have heads before slots."""
    by_head = (each.permute(1, 2, 0, 3) for each in (query, key, value))
    return kernel.attend(*by_head, scale=scale)


def _place(rows: torch.Tensor, received: Received, b: int) -> torch.Tensor:
    """Puts rows from the order of the wire into their slots, ``[slots, b, width]``."""
    placed = rows.new_zeros(received.slots * b, rows.size(1))
    placed[received.receive_rows] = rows
    return placed.view(received.slots, b, rows.size(1))


def _grads(
    computed: Computed, grads: Computed, inputs: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(computed, inputs, grads)


def _add_returned(
    own: Sequence[torch.Tensor], pending: PendingRows, received: Received
) -> list[torch.Tensor]:
    """Adds the gradients that come back, in the order of the ranks that send them."""
    total = torch.cat(list(own), dim=2).float()
    flat = total.view(-1, total[0, 0].numel())
    counts = received.send_counts
    returned = zip(received.send_rows.split(counts), pending.wait().split(counts), strict=True)
    # Rows of one rank are unlike, so nothing is added to one place twice at a time.
    for places, part in returned:
        flat.index_add_(0, places, part.float())
    return [each.to(own[0].dtype) for each in total.chunk(2, dim=2)]
