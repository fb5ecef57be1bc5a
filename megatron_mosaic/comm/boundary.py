"""The boundary between two modules over the microbatches of a step."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType

import torch

from megatron_mosaic.comm.exchange import Exchange
from megatron_mosaic.comm.pending import Pending
from megatron_mosaic.comm.rank_route import BoundarySides, Direction, Microbatch, Samples
from megatron_mosaic.comm.route import NodeOf, Route
from megatron_mosaic.layout.dealt import DealtItems
from megatron_mosaic.layout.item_costs import Owners
from megatron_mosaic.layout.ownership import Selection, count_rows, row_offsets
from megatron_mosaic.layout.placement import ModulePlacement
from megatron_mosaic.layout.rows import Interval
from megatron_mosaic.layout.sequences import MaskedSharding, SampleSequence, Sharding

# Replica of every item, by task (its microbatches) and sample of the task.
TaskOwners = Mapping[tuple[int, ...], Owners]

# Microbatches whose samples have equal rows share their routes, in one step and over the steps.
# Where positions matter they seldom do, and a route is kept with the positions of all its rows.
_CACHED_ROUTES = 4096
_CACHED_ROUTES_BY_POSITION = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class ItemShape:
    """One item, such as an image, inside an encoder; a sample has any number of them.

    Args:
        rows: Boundary rows that it becomes.
        shards: Those of them that each context-parallel rank makes; None where that size is 1.
        tokens: Tokens of it that a rank has between two pipeline stages.
        hidden_size: Width of these tokens.
    """

    rows: int = 1
    shards: tuple[Interval, ...] | None = None
    tokens: int = 0
    hidden_size: int = 0


ONE_ROW = ItemShape()


@dataclass(frozen=True, kw_only=True, slots=True)
class BoundaryShape:
    """What a boundary's rows are made of, beside the layouts of its two sides.

    Args:
        samples_per_replica: Samples of a microbatch of one replica of the destination.
        sharding: How the destination splits its sequences, if it does.
        item: What the source turns into rows.
    """

    samples_per_replica: int
    sharding: Sharding | None = None
    item: ItemShape = ONE_ROW


class BoundaryRoutes:
    """Who makes and who keeps the rows of each microbatch, and how they get there.

    Args:
        source: The module that makes the rows, in tasks over groups of microbatches.
        destination: The module that keeps them, one microbatch at a time.
        shape: What the rows are made of.
        node_of: Node of every rank; None where there is one.
    """

    def __init__(
        self,
        source: ModulePlacement,
        destination: ModulePlacement,
        *,
        shape: BoundaryShape,
        node_of: NodeOf | None = None,
    ) -> None:
        self._sides = BoundarySides(
            source=source,
            destination=destination,
            samples_per_replica=shape.samples_per_replica,
            sharding=shape.sharding,
            item_rows=shape.item.rows,
            item_shards=shape.item.shards,
            node_of=node_of,
        )
        self._size = shape.samples_per_replica * destination.data_parallel_size
        self._group_of: dict[int, tuple[int, ...]] = {}
        self._carried = self._made = _StepRows((), owners={})
        self._by_mask = isinstance(shape.sharding, MaskedSharding)
        size = _CACHED_ROUTES if shape.sharding is None else _CACHED_ROUTES_BY_POSITION
        self._routes = lru_cache(size)(self._derive)

    def begin(
        self,
        samples: Samples,
        *,
        groups: Sequence[tuple[int, ...]],
        owners: TaskOwners = MappingProxyType({}),
        sequences: Sequence[SampleSequence] = (),
    ) -> None:
        """Takes what differs between steps.

        Args:
            samples: Where the rows of every sample of the step belong.
            groups: Microbatches of every task of the source.
            owners: Replica of every item of each task, where the source's items are dealt.
            sequences: What decides which rank of the destination keeps which tokens of every
                sample, where their masks do.
        """
        self._carried = self._made = _StepRows(samples, owners=owners, sequences=sequences)
        self._group_of = {m: group for group in groups for m in group}

    def begin_ahead(self, samples: Samples, *, owners: TaskOwners = MappingProxyType({})) -> None:
        """Makes the source run on the next step's samples; those of this step are still carried."""
        self._made = _StepRows(samples, owners=owners)

    def rows_made(self, microbatch: int, *, rank: int) -> int:
        """Rows of a microbatch that a rank of the source makes."""
        made_of, sides = self._microbatch(microbatch, of=self._made), self._sides
        position = sides.source.coordinates(rank)
        selection = Selection(
            samples=sides.samples_made(made_of, dp=position.dp), position=position
        )
        return sides.produced(made_of, selection=selection).rows[rank].size

    def items_made(self, microbatch: int, *, dp: int) -> int:
        """Items of a microbatch, such as images, that a replica of the source turns into rows."""
        return self._sides.items_made(self._microbatch(microbatch, of=self._made), dp=dp)

    def route(self, direction: Direction, microbatch: int, *, rank: int) -> Route:
        """A rank's part of the route of a microbatch's rows, or of their gradient back.

        It has the rows that the rank holds and wants, and the legs that begin or end there, as
        the whole route has them.
        """
        return self._routes(direction, self._microbatch(microbatch, of=self._carried), rank)

    def _derive(self, direction: Direction, microbatch: Microbatch, rank: int) -> Route:
        return self._sides.route(direction, microbatch, rank=rank)

    def _microbatch(self, microbatch: int, *, of: "_StepRows") -> Microbatch:
        found = of.microbatches.get(microbatch)
        if found is None:
            own = slice(microbatch * self._size, (microbatch + 1) * self._size)
            samples, counts = of.samples[own], of.counts[own]
            if self._sides.sharding is None:
                # Only how many rows there are matters: more microbatches then share their routes.
                runs_of = {count: (Interval(0, count),) for count in set(counts)}
                samples = tuple([runs_of[count] for count in counts])
            found = self._place(microbatch, samples, counts, of=of)
            of.microbatches[microbatch] = found
        return found

    def _place(
        self, microbatch: int, samples: Samples, counts: Sequence[int], *, of: "_StepRows"
    ) -> Microbatch:
        """Places a microbatch in its group, or tells to whom its items are dealt."""
        group = self._group_of[microbatch]
        own = slice(microbatch * self._size, (microbatch + 1) * self._size)
        first, group_size, dealt = (microbatch - group[0]) * self._size, len(group), None
        if group in of.owners:
            dealt = DealtItems.of(of.owners[group][first : first + self._size], of.samples[own])
            first, group_size = 0, 1
        # Rows that are made, but not carried yet, need not know who keeps them.
        sequences = tuple(of.sequences[own]) or None if self._by_mask else None
        return Microbatch(
            samples=samples,
            offsets=row_offsets(counts),
            first=first,
            group_size=group_size * self._size,
            dealt=dealt,
            sequences=sequences,
        )


class _StepRows:
    """Rows of one step's samples, and its microbatches as far as they were asked for."""

    def __init__(
        self, samples: Samples, *, owners: TaskOwners, sequences: Sequence[SampleSequence] = ()
    ) -> None:
        self.samples = samples
        self.sequences = sequences
        self.owners = owners
        self.counts = [count_rows(runs) for runs in samples]
        self.microbatches: dict[int, Microbatch] = {}


class BoundaryChannel:
    """One direction of a boundary, on this rank."""

    def __init__(
        self, direction: Direction, routes: BoundaryRoutes, exchange: Exchange, *, rank: int
    ) -> None:
        self._direction: Direction = direction
        self._routes = routes
        self._exchange = exchange
        self._rank = rank

    def split(
        self, leaving: torch.Tensor | None, microbatches: Sequence[int]
    ) -> Sequence[torch.Tensor | None]:
        """Cuts the rows of one task of the sender into those of its microbatches."""
        if leaving is None or len(microbatches) == 1:
            return [leaving] * len(microbatches)
        sizes = [self._routes.rows_made(m, rank=self._rank) for m in microbatches]
        return leaving.split(sizes)

    def join(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """Puts the rows of a task's microbatches together."""
        return parts[0] if len(parts) == 1 else torch.cat(list(parts))

    def post(self, microbatch: int, leaving: torch.Tensor | None) -> Pending:
        """Issues this rank's sends and receives of one microbatch."""
        return self._exchange.post(
            self._routes.route(self._direction, microbatch, rank=self._rank), leaving
        )

    def received_bytes(self, microbatch: int) -> int:
        """Bytes that one microbatch brings to this rank from others."""
        route = self._routes.route(self._direction, microbatch, rank=self._rank)
        num_rows = sum(
            leg.interval.size for leg in route.legs if leg.destination == self._rank != leg.source
        )
        if (gather := route.gather_of(self._rank)) is not None:
            num_rows += (len(gather.ranks) - 1) * gather.share_size
        return num_rows * self._exchange.hidden_size * self._exchange.dtype.itemsize
