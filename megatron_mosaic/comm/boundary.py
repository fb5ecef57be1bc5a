"""The boundary between two modules over the microbatches of a step."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch

from megatron_mosaic.comm.exchange import Exchange
from megatron_mosaic.comm.pending import Pending
from megatron_mosaic.comm.route import Route, gradient_route, route
from megatron_mosaic.layout.ownership import (
    Ownership,
    Runs,
    count_rows,
    encoder_samples,
    kept,
    produced,
)
from megatron_mosaic.layout.placement import ModulePlacement
from megatron_mosaic.layout.rows import Interval
from megatron_mosaic.layout.sharding import SequenceSharding

Direction = Literal["activation", "gradient"]
Samples = tuple[Runs, ...]

# Steps whose samples have equal rows share their routes.
_CACHED_ROUTES = 4096


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
    sharding: SequenceSharding | None = None
    item: ItemShape = ONE_ROW


class BoundaryRoutes:
    """Who makes and who keeps the rows of each microbatch, and how they get there.

    Args:
        source: The module that makes the rows, in tasks over groups of microbatches.
        destination: The module that keeps them, one microbatch at a time.
        shape: What the rows are made of.
    """

    def __init__(
        self, source: ModulePlacement, destination: ModulePlacement, *, shape: BoundaryShape
    ) -> None:
        self._source = source
        self._destination = destination
        self._shape = shape
        self._size = shape.samples_per_replica * destination.data_parallel_size
        self._group_of: dict[int, tuple[int, ...]] = {}
        self._samples: Samples = ()
        self._owners = lru_cache(_CACHED_ROUTES)(self._derive_owners)
        self._routes = lru_cache(_CACHED_ROUTES)(self._derive_route)

    def begin(self, samples: Samples, *, groups: Sequence[tuple[int, ...]]) -> None:
        """Takes what differs between steps.

        Args:
            samples: Where the rows of every sample of the step belong.
            groups: Microbatches of every task of the source.
        """
        if self._shape.sharding is None:
            # Only how many there are matters: more steps then share their routes.
            samples = tuple((Interval(0, count_rows(runs)),) for runs in samples)
        self._samples = samples
        self._group_of = {m: group for group in groups for m in group}

    def rows_made(self, microbatch: int, *, rank: int) -> int:
        """Rows of a microbatch that a rank of the source makes."""
        produced_rows, _ = self._owners(*self._key(microbatch))
        return produced_rows.rows[rank].size

    def items_made(self, microbatch: int, *, dp: int) -> int:
        """Items of a microbatch, such as images, that a replica of the source turns into rows."""
        samples, position = self._key(microbatch)
        shares = encoder_samples(len(samples), data_parallel_size=self._source.data_parallel_size)
        own = shares[dp].clip(self._microbatch(position))
        rows = sum(count_rows(runs) for runs in samples[own.start : own.stop])
        return rows // self._shape.item.rows

    def samples(self, microbatch: int, *, dp: int) -> Samples:
        """Where the rows belong of the samples that a replica of the destination runs."""
        first = microbatch * self._size + dp * self._shape.samples_per_replica
        return self._samples[first : first + self._shape.samples_per_replica]

    def route(self, direction: Direction, microbatch: int) -> Route:
        """Route of a microbatch's rows to the destination, or of their gradient back."""
        return self._routes(direction, *self._key(microbatch))

    def _key(self, microbatch: int) -> tuple[Samples, int]:
        """Rows of every sample of the source's task, and the microbatch's place in it."""
        group = self._group_of[microbatch]
        first = group[0] * self._size
        samples = self._samples[first : first + len(group) * self._size]
        return samples, microbatch - group[0]

    def _derive_owners(self, samples: Samples, position: int) -> tuple[Ownership, Ownership]:
        own = self._microbatch(position)
        return (
            produced(
                self._source,
                group_counts=[count_rows(runs) for runs in samples],
                microbatch=own,
                item_rows=self._shape.item.rows,
                item_shards=self._shape.item.shards,
            ),
            kept(
                self._destination,
                samples=samples[own.start : own.stop],
                samples_per_replica=self._shape.samples_per_replica,
                sharding=self._shape.sharding,
            ),
        )

    def _microbatch(self, position: int) -> Interval:
        return Interval(position * self._size, (position + 1) * self._size)

    def _derive_route(self, direction: Direction, samples: Samples, position: int) -> Route:
        find = route if direction == "activation" else gradient_route
        return find(*self._owners(samples, position))


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
        return self._exchange.post(self._routes.route(self._direction, microbatch), leaving)
