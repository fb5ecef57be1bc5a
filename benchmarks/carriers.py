"""What carries rows over a boundary: Mosaic's exchange, and upstream's two communicators.

A carrier is made on every rank of a world. Its ``carry`` takes the rows that a rank makes to where
they are kept, lets the kept rows be their own gradient (that of half the sum of their squares), and
brings the gradient back: so the gradient that arrives must equal the rows that were made.
"""

import copy
from typing import Protocol

import torch
import torch.distributed as dist

from benchmarks.layout_pairs import HIDDEN_SIZE, ITEM_ROWS, MASK, SEQUENCE_LENGTH, Pair, Side
from benchmarks.oracle import rows_made, rows_of, sequence_of
from megatron_mosaic.comm.boundary import BoundaryRoutes, BoundaryShape, ItemShape
from megatron_mosaic.comm.exchange import Exchange
from megatron_mosaic.comm.groups import GroupFactory
from megatron_mosaic.layout.attention import AttentionPlan
from megatron_mosaic.layout.placement import ModulePlacement
from megatron_mosaic.layout.rows import Interval, split_evenly
from megatron_mosaic.layout.sequences import sharding_of

CPU = torch.device("cpu")


class UnsupportedError(Exception):
    """A carrier does not take a pair of layouts; the text is its reason."""


class Carrier(Protocol):
    """Takes rows to the destination, and their gradient back."""

    def carry(self, rows: torch.Tensor | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Carries both ways.

        Args:
            rows: What this rank makes ``[rows, h]``; None if it is no maker.

        Returns:
            The rows that it keeps and the gradient of those that it made, where there are any.
        """
        ...

    def destroy(self) -> None:
        """Destroys the groups that were made."""
        ...


def own_rows(pair: Pair, rank: int) -> torch.Tensor | None:
    """Rows that a rank makes ``[rows, h]``; None on a rank that is no maker."""
    side = pair.source
    if rank not in side.ranks[-len(side.ranks) // side.pp :]:
        return None
    return all_rows(pair)[sorted(rows_made(pair, rank))]


def all_rows(pair: Pair) -> torch.Tensor:
    """Rows of the microbatch as one process has them; no two are alike."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(len(rows_of(pair)), HIDDEN_SIZE, generator=generator)


class Mosaic:
    """Mosaic's exchange.

    Args:
        pair: The layouts.
        rank: This rank.
    """

    def __init__(self, pair: Pair, rank: int) -> None:
        self._rank = rank
        self._factory = GroupFactory(rank)
        self._source = _placement("vision", pair.source)
        self._destination = _placement("language", pair.destination)
        self._shape = BoundaryShape(
            samples_per_replica=len(pair.items) // pair.destination.dp,
            sharding=sharding_of(self._destination, sequence_length=SEQUENCE_LENGTH),
            item=ItemShape(
                rows=ITEM_ROWS,
                shards=split_evenly(ITEM_ROWS, pair.source.cp) if pair.source.cp > 1 else None,
            ),
        )
        runs: list[list[Interval]] = [[] for _ in pair.items]
        for row in rows_of(pair):
            if row.place == 0:
                runs[row.sample].append(Interval(row.position, row.position + ITEM_ROWS))
        self._samples = tuple(tuple(each) for each in runs)
        self._sequences = tuple(sequence_of(pair, sample) for sample in range(len(pair.items)))
        self._forward = self._exchange("activation", receiver=self._destination)
        self._backward = self._exchange("gradient", receiver=self._source)
        self._routes: BoundaryRoutes | None = self._new_routes()

    def deriving_anew(self) -> "Mosaic":
        """Returns a carrier on the same groups that derives its routes every time."""
        other = copy.copy(self)
        other._routes = None
        return other

    def carry(self, rows: torch.Tensor | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """As :class:`Carrier` says."""
        routes = self._routes or self._new_routes()
        forward = routes.route("activation", 0, rank=self._rank)
        kept = self._forward.post(forward, rows).wait()
        keeps = self._rank in self._destination.stage_ranks(0)
        gradient = routes.route("gradient", 0, rank=self._rank)
        arrived = self._backward.post(gradient, kept if keeps else None).wait()
        return (kept if keeps else None), (None if rows is None else arrived)

    def destroy(self) -> None:
        """Destroys the groups that were made."""
        self._factory.destroy()

    def _new_routes(self) -> BoundaryRoutes:
        routes = BoundaryRoutes(self._source, self._destination, shape=self._shape)
        routes.begin(self._samples, groups=[(0,)], sequences=self._sequences)
        return routes

    def _exchange(self, scope: str, *, receiver: ModulePlacement) -> Exchange:
        group = self._factory.group(range(dist.get_world_size()), scope=scope)
        replicas = [
            self._factory.group(sorted(ranks), scope=f"{scope} replicas")
            for ranks in receiver.groups("tp")
            if len(ranks) > 1
        ]
        assert group is not None
        return Exchange(
            group=group,
            gather_group=next((group for group in replicas if group is not None), None),
            hidden_size=HIDDEN_SIZE,
            dtype=torch.float32,
            device=CPU,
        )


class Bridge:
    """Upstream's communicator of modules on disjoint ranks.

    With sequence parallelism at the destination every rank gets whole sequences, to slice them.
    """

    def __init__(self, pair: Pair, rank: int) -> None:
        from megatron.core.pipeline_parallel.bridge_communicator import BridgeCommunicator

        _refuse_other_ranks(pair)
        self._sizes = _sizes_to_split(pair, rank)
        self._source, self._destination = _grid(pair.source), _grid(pair.destination)
        try:
            self._bridge = BridgeCommunicator(
                self._source,
                self._destination,
                dim_mapping={"s": 0, "h": 2, "b": 1},
                comm_dtype=torch.float32,
                tensor_ndim=2,
            )
        except (AssertionError, ValueError) as error:
            self.destroy()
            raise UnsupportedError(_one_line(error)) from error

    def carry(self, rows: torch.Tensor | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """As :class:`Carrier` says."""
        bridge, kept, arrived = self._bridge, None, None
        if rows is not None:
            if self._sizes is not None:
                rows._mimo_bridge_split_sizes = self._sizes  # type: ignore[attr-defined]
            bridge.send_forward(rows)
        if bridge.is_current_rank_in_grid(self._destination):
            kept = bridge.recv_forward()
            if kept is not None:
                kept = kept.detach()
                bridge.send_backward(kept)
        if rows is not None:
            arrived = bridge.recv_backward()
        return kept, arrived

    def destroy(self) -> None:
        """Destroys the groups that were made."""
        from megatron.core.pipeline_parallel.bridge_communicator import BridgeCommunicator

        BridgeCommunicator.destroy_broadcast_pgs()
        BridgeCommunicator.destroy_bridge_pgs()


class Colocated:
    """Upstream's communicator of modules on the same ranks.

    With sequence parallelism at the destination every rank gets whole sequences, to slice them.
    """

    def __init__(self, pair: Pair, rank: int) -> None:
        from megatron.core.models.mimo.comm.colocated_communicator import (
            ColocatedBridgeCommunicator,
        )

        try:
            self._bridge = ColocatedBridgeCommunicator(
                _grid(pair.source), _grid(pair.destination), dim_mapping={"b": 0, "h": 1}
            )
        except ValueError as error:
            raise UnsupportedError(_one_line(error)) from error
        if len(set(pair.items)) > 1:
            self.destroy()
            raise UnsupportedError("needs the same number of rows of every sample")

    def carry(self, rows: torch.Tensor | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """As :class:`Carrier` says."""
        assert rows is not None
        leaf = rows.detach().requires_grad_()
        kept = self._bridge.communicate(leaf)
        kept.backward(kept.detach())
        return kept.detach(), leaf.grad

    def destroy(self) -> None:
        """Destroys the groups that were made."""
        self._bridge.destroy()


def upstream(pair: Pair, rank: int) -> Carrier:
    """Returns upstream's communicator for a pair.

    Raises:
        UnsupportedError: Upstream has none; raised alike on every rank.

    Note:
        Collective over the world.
    """
    if pair.destination.tokens is not None:
        raise UnsupportedError("splits all sequences alike, in zigzag")
    return Colocated(pair, rank) if pair.ranks == "equal" else Bridge(pair, rank)


def _placement(name: str, side: Side) -> ModulePlacement:
    return ModulePlacement(
        name=name,
        ranks=side.ranks,
        tensor_model_parallel_size=side.tp,
        context_parallel_size=side.cp,
        data_parallel_size=side.dp,
        pipeline_model_parallel_size=side.pp,
        sequence_parallel=side.sp,
        attention=AttentionPlan(mask=MASK, tokens=side.tokens) if side.tokens else None,
    )


def _grid(side: Side):  # noqa: ANN202 - upstream's class, imported late
    from megatron.core.hyper_comm_grid import HyperCommGrid

    return HyperCommGrid(
        shape=[side.tp, side.cp, side.dp, side.pp],
        dim_names=["tp", "cp", "dp", "pp"],
        rank_offset=side.ranks[0],
    )


def _refuse_other_ranks(pair: Pair) -> None:
    for side in (pair.source, pair.destination):
        if list(side.ranks) != list(range(side.ranks[0], side.ranks[0] + len(side.ranks))):
            raise UnsupportedError("HyperCommGrid has a first rank and a shape: consecutive ranks")
    if pair.ranks == "overlapping":
        raise UnsupportedError("BridgeCommunicator gives a rank one role, sender or receiver")


def _sizes_to_split(pair: Pair, rank: int) -> list[int] | None:
    """Rows of each sample of this rank's replica where they differ, as MimoModel notes them."""
    if len(set(pair.items)) == 1:
        return None
    source, destination = pair.source, pair.destination
    if source.dp > destination.dp:
        raise UnsupportedError(
            "MimoModel asserts encoder DP <= LM DP where samples have unlike numbers of rows"
        )
    if rank not in source.ranks:
        return None
    dp = source.ranks.index(rank) // (source.tp * source.cp) % source.dp
    size = len(pair.items) // source.dp
    return [num * ITEM_ROWS for num in pair.items[dp * size : (dp + 1) * size]]


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
