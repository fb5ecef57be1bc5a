"""Carries out a route: moves the rows of one boundary in one direction."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_mosaic.comm.groups import wire_of
from megatron_mosaic.comm.route import Gather, Leg, Route
from megatron_mosaic.layout.rows import Interval, Places, Rows

Values = tuple[Interval, torch.Tensor]  # of consecutive rows


@dataclass(frozen=True, kw_only=True, slots=True)
class Exchange:
    """One direction of one boundary, on this rank.

    Every rank of ``group`` posts the same routes in the same order; a rank that has no part in
    a route may leave it out. Forward and gradient need a group each: the two sides of a
    boundary meet them in different orders, and a communicator has only one.

    Args:
        group: All ranks at the boundary, warmed up: NCCL's first batch needs every member.
        gather_group: Replicas of this rank that receive shares, the tensor-parallel group of
            the receiving module; None where there is none.
        hidden_size: Width of a row.
        dtype: Type of the rows.
        device: Where the rows come from and go to.
    """

    group: dist.ProcessGroup
    gather_group: dist.ProcessGroup | None
    hidden_size: int
    dtype: torch.dtype
    device: torch.device

    def post(self, route: Route, rows: torch.Tensor | None) -> "PendingExchange":
        """Issues this rank's sends and receives as one batch, and waits for nothing.

        Args:
            route: The same on every rank.
            rows: What this rank holds, ``[rows, h]``, as ``route.held`` says; None if nothing.
                It must not change until the exchange is finished.
        """
        rank, wire = dist.get_rank(), wire_of(self.group, device=self.device)
        held = route.held.get(rank, Rows())
        rows = self.empty(0) if rows is None else rows.detach().contiguous()
        self._check(rows, held)
        places = Places(held)
        outgoing = {
            peer: _pack([rows[places.slice(leg.interval)] for leg in legs]).to(wire)
            for peer, legs in _by_peer(route.legs, sender=rank).items()
        }
        arriving = _by_peer(route.legs, receiver=rank)
        incoming = {
            peer: self.empty(sum(leg.interval.size for leg in legs), on=wire)
            for peer, legs in arriving.items()
        }
        arrived: list[Values] = [
            (leg.interval, rows[places.slice(leg.interval)])
            for leg in route.legs
            if leg.source == leg.destination == rank
        ]
        for peer, legs in arriving.items():
            arrived += _unpack(incoming[peer], legs)
        return PendingExchange(
            exchange=self,
            wanted=route.wanted.get(rank, Rows()),
            gather=route.gather_of(rank),
            arrived=arrived,
            outgoing=list(outgoing.values()),
            works=self._issue(outgoing, incoming),
        )

    def empty(self, num_rows: int, *, on: torch.device | None = None) -> torch.Tensor:
        """Returns a tensor of rows to be filled, on the rows' device unless another is given."""
        return torch.empty(num_rows, self.hidden_size, dtype=self.dtype, device=on or self.device)

    def gather(self, share: torch.Tensor, gather: Gather) -> torch.Tensor:
        """All-gathers the shares of the replicas, ``[share_size, h]`` each."""
        assert self.gather_group is not None, f"replicas {gather.ranks} need a group"
        members = dist.get_process_group_ranks(self.gather_group)
        assert members == list(gather.ranks), f"group {members} must be replicas {gather.ranks}"
        wire = wire_of(self.gather_group, device=self.device)
        shares = self.empty(len(gather.ranks) * gather.share_size, on=wire)
        # Renamed in torch 2.13, where the old name warns.
        all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        all_gather(shares, share.to(wire), group=self.gather_group)
        return shares[: gather.rows.size].to(self.device)

    def _issue(
        self, outgoing: Mapping[int, torch.Tensor], incoming: Mapping[int, torch.Tensor]
    ) -> list[dist.Work]:
        # There is at most one message each way between two ranks, so no order within the batch
        # can mismatch; ascending peers make it the same in every run.
        operations = [
            *(self._operation(dist.isend, outgoing[peer], peer) for peer in sorted(outgoing)),
            *(self._operation(dist.irecv, incoming[peer], peer) for peer in sorted(incoming)),
        ]
        return dist.batch_isend_irecv(operations) if operations else []

    def _operation(
        self, kind: Callable[..., dist.Work | None], message: torch.Tensor, peer: int
    ) -> dist.P2POp:
        return dist.P2POp(kind, message, peer, group=self.group)

    def _check(self, rows: torch.Tensor, held: Rows) -> None:
        expected = (held.size, self.hidden_size)
        assert rows.shape == expected, f"rows are {tuple(rows.shape)}, the route says {expected}"
        assert rows.dtype == self.dtype, f"rows are {rows.dtype}, the exchange has {self.dtype}"


@dataclass(kw_only=True, slots=True)
class PendingExchange:
    """An exchange that was posted. It keeps the buffers alive.

    Note:
        On CUDA the buffers belong to the stream on which it was posted. Whoever waits on another
        one records it with ``buffers``, and with what arrived, before the wait lets go of them.
    """

    exchange: Exchange
    wanted: Rows
    gather: Gather | None
    arrived: Sequence[Values] | None
    outgoing: Sequence[torch.Tensor]
    works: Sequence[dist.Work]

    def wait(self) -> torch.Tensor:
        """Blocks until the rows of this rank have arrived, and hands them over: call it once.

        Returns:
            What the rank wants, ``[rows, h]``; no rows if it wants nothing. It may share its
            memory with the rows that were posted.

        Note:
            Collective over the replicas of this rank where they receive shares.
        """
        assert self.arrived is not None, "these rows were handed over already"
        self._wait_for_messages()
        device = self.exchange.device
        arrived = [(interval, values.to(device)) for interval, values in self.arrived]
        self.arrived = None
        return self._assemble(arrived)

    def buffers(self) -> Sequence[torch.Tensor]:
        """Returns what leaves and what arrives; rows that stay on the rank are the sender's."""
        return (*self.outgoing, *(values for _, values in self.arrived or ()))

    def is_done(self) -> bool:
        """Tells, without waiting, whether nothing is under way any more."""
        return all(work.is_completed() for work in self.works)

    def finish(self) -> None:
        """Blocks until this rank's buffers are free; rows that nobody waited for are dropped."""
        self._wait_for_messages()
        self.arrived = None

    def _wait_for_messages(self) -> None:
        for work in self.works:
            work.wait()
        self.works = self.outgoing = ()

    def _assemble(self, arrived: Sequence[Values]) -> torch.Tensor:
        whole = list(arrived)
        if self.gather is not None:
            gathered, whole = self._gather(arrived, self.gather)
            first = 0
            for interval in self.gather.rows:
                whole.append((interval, gathered[first : first + interval.size]))
                first += interval.size
        return _sum(whole, over=self.wanted, empty=self.exchange.empty(0))

    def _gather(
        self, arrived: Sequence[Values], gather: Gather
    ) -> tuple[torch.Tensor, list[Values]]:
        """Returns the gathered rows, and what arrived beside them."""
        whole: list[Values] = []
        parts: list[Values] = []
        places = Places(gather.rows)
        for interval, values in arrived:
            first = places.find(interval.start)
            if first is None:
                whole.append((interval, values))
            else:
                parts.append((Interval(first, first + interval.size), values))
        share = gather.share(gather.ranks.index(dist.get_rank()))
        padded = Interval(share.start, share.start + gather.share_size)
        own = _sum(parts, over=Rows([padded]), empty=self.exchange.empty(0))
        return self.exchange.gather(own, gather), whole


def _by_peer(
    legs: Iterable[Leg], *, sender: int | None = None, receiver: int | None = None
) -> dict[int, list[Leg]]:
    """Legs that leave the sender or reach the receiver, by the rank at the other end."""
    by_peer: dict[int, list[Leg]] = {}
    for leg in legs:
        if leg.source != leg.destination:
            if leg.source == sender:
                by_peer.setdefault(leg.destination, []).append(leg)
            elif leg.destination == receiver:
                by_peer.setdefault(leg.source, []).append(leg)
    return by_peer


def _pack(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def _unpack(message: torch.Tensor, legs: Sequence[Leg]) -> list[Values]:
    parts = message.split([leg.interval.size for leg in legs])
    return [(leg.interval, part) for leg, part in zip(legs, parts, strict=True)]


def _sum(parts: Sequence[Values], *, over: Rows, empty: torch.Tensor) -> torch.Tensor:
    """Adds parts up, each at its rows; rows without a part are zero.

    Most often the parts lie side by side: then nothing is added, and a single part not even
    copied.
    """
    parts = sorted(parts, key=lambda part: part[0])
    sizes = sum(interval.size for interval, _ in parts)
    if sizes == over.size and Rows.of(interval for interval, _ in parts) == over:
        return _pack([values for _, values in parts]) if parts else empty
    total = empty.new_zeros(over.size, empty.size(1))
    places = Places(over)
    for interval, values in parts:
        total[places.slice(interval)] += values
    return total
