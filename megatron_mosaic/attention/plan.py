"""What a rank computes and exchanges for a batch, derived from masks and assignments once."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache
from hashlib import blake2b
from logging import getLogger

import numpy as np
import torch

from megatron_mosaic.attention.choice import Exchange, ExchangeWish, cheaper_exchange
from megatron_mosaic.attention.dense import DenseKernel
from megatron_mosaic.attention.flex import FlexKernel
from megatron_mosaic.attention.needed import NeededKeys, alone
from megatron_mosaic.attention.part import Kernel, Part
from megatron_mosaic.attention.wire import WireRows
from megatron_mosaic.cost.collectives import Group
from megatron_mosaic.tokens.assignment import TokenAssignment
from megatron_mosaic.tokens.held import Held
from megatron_mosaic.tokens.mask import SequenceMask
from megatron_mosaic.tokens.tiles import KERNEL_TILE

_LOGGER = getLogger(__name__)

_PLANS_KEPT = 32
"""Plans of the last batches: those of the microbatches under way, which backward and
recomputation come back to, and no more than that, as block masks take memory of the device."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Received:
    """What a rank does with keys of others.

    Args:
        exchange: How keys come to the ranks of the group, the same on all of them.
        send_counts: As :class:`WireRows` has it, and so what follows; on the device.
        send_rows: Ditto.
        receive_counts: Ditto.
        receive_rows: Ditto.
        gathered_rows: Ditto.
        slots: Slots of the received keys, zero where the rank needs none.
        kernel: Computes attention to them; None where the rank needs none.
    """

    exchange: Exchange
    send_counts: list[int]
    send_rows: torch.Tensor
    receive_counts: list[int]
    receive_rows: torch.Tensor
    gathered_rows: torch.Tensor
    slots: int
    kernel: Kernel | None


@dataclass(frozen=True, kw_only=True, eq=False)
class RankPlan:
    """Attention of one rank for a batch.

    Args:
        own: Computes attention to the rank's own keys.
        received: What is with the keys of others; None if no rank of the group needs any.
    """

    own: Kernel
    received: Received | None


def rank_plan(
    masks: Sequence[SequenceMask],
    assignments: Sequence[TokenAssignment] | None,
    *,
    rank: int,
    slots: int,
    device: torch.device,
    wish: ExchangeWish = "auto",
    row_bytes: int = 1,
    links: Group | None = None,
) -> RankPlan:
    """Derives the plan of a rank, or finds it among those of the last batches.

    Args:
        masks: One for each sample.
        assignments: Who keeps which tokens of each sample; None is a group of one rank.
        rank: Of the context-parallel group.
        slots: Of this and every other rank's tensors.
        device: Where attention is computed.
        wish: How keys shall travel.
        row_bytes: Bytes of a row of keys and values.
        links: Of the group, where they are known.
    """
    assignments = tuple(assignments or (alone(mask) for mask in masks))
    batch = _Batch(tuple(masks), assignments, _digest(masks, assignments))
    return _rank_plan(batch, rank, slots, device, wish, row_bytes, links)


@dataclass(frozen=True)
class _Batch:
    """Masks and assignments, which are equal where what they say is."""

    masks: tuple[SequenceMask, ...] = field(compare=False)
    assignments: tuple[TokenAssignment, ...] = field(compare=False)
    digest: bytes


def _digest(masks: Sequence[SequenceMask], assignments: Sequence[TokenAssignment]) -> bytes:
    digest = blake2b(digest_size=16)
    for mask, assignment in zip(masks, assignments, strict=True):
        cut = assignment.cut
        sizes = np.array([mask.num_segments, cut.length, cut.cp, cut.block], dtype=np.int64)
        columns = (mask.stops, mask.document, mask.group, mask.shown, mask.sees)
        for values in (sizes, *columns, assignment.owner):
            digest.update(np.ascontiguousarray(values, dtype=np.int64).data)
    return digest.digest()


@lru_cache(maxsize=_PLANS_KEPT)
def _rank_plan(
    batch: _Batch,
    rank: int,
    slots: int,
    device: torch.device,
    wish: ExchangeWish,
    row_bytes: int,
    links: Group | None,
) -> RankPlan:
    held = [assignment.held(rank) for assignment in batch.assignments]
    samples = [NeededKeys.of(*each) for each in zip(batch.masks, batch.assignments, strict=True)]
    rows = np.sum([needed.rows() for needed in samples], axis=0)

    def kernel(keys: Sequence[Held], key_slots: int) -> Kernel:
        part = Part(
            masks=batch.masks,
            queries=held,
            query_slots=slots,
            keys=keys,
            key_slots=key_slots,
            device=device,
        )
        return DenseKernel(part=part) if device.type == "cpu" else FlexKernel(part=part)

    received = None
    if rows.any():
        exchange = wish
        if exchange == "auto":
            in_all = slots * len(samples)
            exchange = cheaper_exchange(rows, slots=in_all, row_bytes=row_bytes, links=links)
            if rank == 0:
                _log_choice(exchange)
        received = _received(samples, rank, slots, device, exchange, kernel)
    return RankPlan(own=kernel(held, slots), received=received)


def _received(
    samples: Sequence[NeededKeys],
    rank: int,
    slots: int,
    device: torch.device,
    exchange: Exchange,
    kernel: Callable[[Sequence[Held], int], Kernel],
) -> Received:
    keys = [needed.received(rank) for needed in samples]
    key_slots = max(each.size for each in keys)
    if device.type != "cpu":
        # Whole tiles, so that few lengths occur and no kernel is compiled for each of them.
        key_slots = -(-key_slots // KERNEL_TILE.keys) * KERNEL_TILE.keys
    wire = WireRows.of(samples, rank=rank, slots=slots)
    # On the device once: every layer of every microbatch takes rows by them.
    rows = (wire.send_rows, wire.receive_rows, wire.gathered_rows)
    send_rows, receive_rows, gathered_rows = (torch.from_numpy(each).to(device) for each in rows)
    return Received(
        exchange=exchange,
        send_counts=wire.send_counts,
        send_rows=send_rows,
        receive_counts=wire.receive_counts,
        receive_rows=receive_rows,
        gathered_rows=gathered_rows,
        slots=key_slots,
        kernel=kernel(keys, key_slots) if key_slots else None,
    )


@cache
def _log_choice(exchange: Exchange) -> None:
    """Says once of each way that it was chosen."""
    what = {"blocks": "the blocks that ranks need travel", "all_gather": "ranks gather all keys"}
    _LOGGER.info("attention keys: auto -> %s: %s", exchange, what[exchange])
