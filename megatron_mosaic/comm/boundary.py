"""The boundary between two modules over the microbatches of a step."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

import torch

from megatron_mosaic.comm.exchange import Exchange
from megatron_mosaic.comm.pending import Pending
from megatron_mosaic.comm.route import Route, gradient_route, route
from megatron_mosaic.layout.ownership import Interval, Ownership, kept, produced
from megatron_mosaic.layout.placement import ModulePlacement

Direction = Literal["activation", "gradient"]
Counts = tuple[int, ...]

# Steps whose samples have equal token counts share their routes.
_CACHED_ROUTES = 4096


class BoundaryRoutes:
    """Who makes and who keeps the rows of each microbatch, and how they get there.

    Args:
        source: The module that makes the rows, in tasks over groups of microbatches.
        destination: The module that keeps them, one microbatch at a time.
        samples_per_replica: Samples of a microbatch of one replica of the destination.
    """

    def __init__(
        self, source: ModulePlacement, destination: ModulePlacement, *, samples_per_replica: int
    ) -> None:
        self._source = source
        self._destination = destination
        self._mbs = samples_per_replica
        self._size = samples_per_replica * destination.data_parallel_size
        self._group_of: dict[int, tuple[int, ...]] = {}
        self._counts: Counts = ()
        self._owners = lru_cache(_CACHED_ROUTES)(self._derive_owners)
        self._routes = lru_cache(_CACHED_ROUTES)(self._derive_route)

    def begin(self, counts: Counts, *, groups: Sequence[tuple[int, ...]]) -> None:
        """Takes what differs between steps.

        Args:
            counts: Rows of every sample of the step.
            groups: Microbatches of every task of the source.
        """
        self._counts = counts
        self._group_of = {m: group for group in groups for m in group}

    def rows_made(self, microbatch: int, *, rank: int) -> int:
        """Rows of a microbatch that a rank of the source makes."""
        produced_rows, _ = self._owners(*self._key(microbatch))
        return produced_rows.intervals[rank].size

    def route(self, direction: Direction, microbatch: int) -> Route:
        """Route of a microbatch's rows to the destination, or of their gradient back."""
        return self._routes(direction, *self._key(microbatch))

    def _key(self, microbatch: int) -> tuple[Counts, int]:
        """Rows of every sample of the source's task, and the microbatch's place in it."""
        group = self._group_of[microbatch]
        first = group[0] * self._size
        counts = self._counts[first : first + len(group) * self._size]
        return counts, microbatch - group[0]

    def _derive_owners(self, counts: Counts, position: int) -> tuple[Ownership, Ownership]:
        samples = Interval(position * self._size, (position + 1) * self._size)
        return (
            produced(self._source, group_counts=counts, microbatch=samples),
            kept(
                self._destination,
                counts=counts[samples.start : samples.stop],
                samples_per_replica=self._mbs,
            ),
        )

    def _derive_route(self, direction: Direction, counts: Counts, position: int) -> Route:
        find = route if direction == "activation" else gradient_route
        return find(*self._owners(counts, position))


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

    def post(self, microbatch: int, leaving: torch.Tensor | None) -> Pending:
        """Issues this rank's sends and receives of one microbatch."""
        return self._exchange.post(self._routes.route(self._direction, microbatch), leaving)
