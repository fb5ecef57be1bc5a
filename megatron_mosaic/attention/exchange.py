"""Moves keys and values to the ranks that need them, and their gradients back."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_mosaic.attention.plan import Received
from megatron_mosaic.comm.groups import wire_of


@dataclass(frozen=True, kw_only=True, eq=False)
class PendingRows:
    """Rows under way to this rank.

    Args:
        work: What is waited for; None where it has come.
        buffer: Where rows arrive.
        outgoing: What this rank sends: it must live until the work is done.
        chosen: Those of the rows that are wanted; None is all.
        device: Where the rows are wanted.
    """

    work: dist.Work | None
    buffer: torch.Tensor
    outgoing: torch.Tensor
    chosen: torch.Tensor | None
    device: torch.device

    def wait(self) -> torch.Tensor:
        """Waits for the rows ``[rows, width]``, in the order of the wire."""
        if self.work is not None:
            self.work.wait()
        rows = self.buffer.to(self.device)
        return rows if self.chosen is None else rows[self.chosen]


def post_keys(rows: torch.Tensor, received: Received, *, group: dist.ProcessGroup) -> PendingRows:
    """Sends this rank's keys and values to those that need them.

    Args:
        rows: All rows of this rank, ``[slots * b, width]``.
        received: What travels.
        group: The context-parallel group.

    Note:
        Collective over the group.
    """
    if received.exchange == "all_gather":
        return _post_gather(rows, received.gathered_rows, group=group)
    chosen = rows[received.send_rows]
    return _post(chosen, received.send_counts, received.receive_counts, group=group)


def post_gradients(
    rows: torch.Tensor, received: Received, *, group: dist.ProcessGroup
) -> PendingRows:
    """Sends the gradients of received rows back to those whose keys they are.

    However keys came, gradients go as blocks: a reduce-scatter would add them in an order that
    is not ours to choose, and in the precision of the rows.

    Args:
        rows: In the order of the wire, ``[rows, width]``.
        received: What travelled.
        group: The context-parallel group.

    Note:
        Collective over the group.
    """
    return _post(rows, received.receive_counts, received.send_counts, group=group)


def _post(
    rows: torch.Tensor,
    send_counts: Sequence[int],
    receive_counts: Sequence[int],
    *,
    group: dist.ProcessGroup,
) -> PendingRows:
    outgoing = rows.to(wire_of(group, device=rows.device)).contiguous()
    buffer = outgoing.new_empty(sum(receive_counts), rows.size(1))
    work = dist.all_to_all_single(
        buffer, outgoing, list(receive_counts), list(send_counts), group=group, async_op=True
    )
    return PendingRows(work=work, buffer=buffer, outgoing=outgoing, chosen=None, device=rows.device)


def _post_gather(
    rows: torch.Tensor, chosen: torch.Tensor, *, group: dist.ProcessGroup
) -> PendingRows:
    outgoing = rows.to(wire_of(group, device=rows.device)).contiguous()
    buffer = outgoing.new_empty(group.size() * rows.size(0), rows.size(1))
    # Renamed in torch 2.13, where the old name warns.
    all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    work = all_gather(buffer, outgoing, group=group, async_op=True)
    return PendingRows(
        work=work, buffer=buffer, outgoing=outgoing, chosen=chosen, device=rows.device
    )
