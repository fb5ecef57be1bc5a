"""The part of a boundary's routes that one rank carries out, without deriving the rest.

A whole route grows with the world; a rank's part depends on few samples. Which ones: those that
it makes or keeps itself, and, where ranks choose among several holders or receive shares, also
those of the replicas that take part in the choice or in the shares.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Literal

from megatron_mosaic.comm.route import NodeOf, Route, gradient_route, route
from megatron_mosaic.layout.dealt import DealtItems
from megatron_mosaic.layout.ownership import (
    Ownership,
    Runs,
    Selection,
    kept,
    produced,
    replicas_of,
)
from megatron_mosaic.layout.placement import Coordinates, ModulePlacement
from megatron_mosaic.layout.rows import Interval, Rows
from megatron_mosaic.layout.sequences import MaskedSharding, SampleSequence, Sharding
from megatron_mosaic.layout.shard_table import ShardTable
from megatron_mosaic.layout.sharding import SequenceSharding

Direction = Literal["activation", "gradient"]
Samples = tuple[Runs, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Microbatch:
    """All that the routes of a microbatch depend on, beside the layouts.

    Args:
        samples: Where the rows of its samples belong.
        offsets: ``row_offsets`` of its samples, which follow from them.
        first: Place of its first sample in the group that the source runs in one task.
        group_size: Samples of that group.
        dealt: Who makes which of its rows, where items are dealt; nothing depends on the group
            then, and the microbatch is one by itself.
        sequences: What decides which rank keeps which tokens of its samples, where their masks do.
    """

    samples: Samples
    offsets: Sequence[int] = field(compare=False)
    first: int
    group_size: int
    dealt: DealtItems | None = None
    sequences: tuple[SampleSequence, ...] | None = None

    @property
    def place(self) -> Interval:
        """Its samples in the group."""
        return Interval(self.first, self.first + len(self.samples))


@dataclass(frozen=True, kw_only=True)
class BoundarySides:
    """The two modules at a boundary, and the samples that their ranks have to do with.

    Args:
        source: The module that makes the rows.
        destination: The module that keeps them.
        samples_per_replica: Samples of a microbatch of one replica of the destination.
        sharding: How the destination splits its sequences, if it does; by their masks, where
            microbatches have sequences.
        item_rows: Rows of one item, such as an image, of the source.
        item_shards: Rows of every item that each context-parallel rank of the source makes; None
            where that size is 1.
        node_of: Node of every rank, where there are several: rows come from the same one if they
            can.
    """

    source: ModulePlacement
    destination: ModulePlacement
    samples_per_replica: int
    sharding: Sharding | None = None
    item_rows: int = 1
    item_shards: tuple[Interval, ...] | None = None
    node_of: NodeOf | None = None

    def route(self, direction: Direction, microbatch: Microbatch, *, rank: int) -> Route:
        """Derives a rank's part of the route of a microbatch, or of its gradient's.

        Args:
            direction: Activations go to the destination, gradients to the source.
            microbatch: Its rows.
            rank: Any rank.

        Returns:
            The legs that begin or end at the rank, as the whole route has them, its gather, and
            the rows that it holds and wants.
        """
        derive = partial(self._derive, direction, microbatch)
        makes = _position(self.source, rank, stage=self.source.pipeline_model_parallel_size - 1)
        keeps = _position(self.destination, rank, stage=0)
        arriving = leaving = None
        if direction == "activation":
            if keeps is not None:
                arriving = self._arrivals(keeps, microbatch, derive)
            if makes is not None:
                leaving = self._departures(makes, microbatch, derive)
        else:
            if makes is not None:
                arriving = self._gradient_arrivals(makes, microbatch, derive)
            if keeps is not None:
                leaving = self._gradient_departures(keeps, microbatch, derive)
        return _part(rank, arriving=arriving, leaving=leaving)

    def produced(self, microbatch: Microbatch, *, selection: Selection | None = None) -> Ownership:
        """Rows that ranks of the source make."""
        return produced(
            self.source,
            offsets=microbatch.offsets,
            microbatch=microbatch.place,
            group_size=microbatch.group_size,
            item_rows=self.item_rows,
            item_shards=self.item_shards,
            selection=selection,
            dealt=microbatch.dealt,
        )

    def kept(self, microbatch: Microbatch, *, selection: Selection | None = None) -> Ownership:
        """Rows that ranks of the destination keep."""
        return kept(
            self.destination,
            samples=microbatch.samples,
            samples_per_replica=self.samples_per_replica,
            sharding=self.sharding,
            selection=selection,
            offsets=microbatch.offsets,
            table_of=partial(self._table_of, microbatch),
        )

    def samples_made(self, microbatch: Microbatch, *, dp: int) -> Rows:
        """Samples of a microbatch of which a replica of the source runs something."""
        if microbatch.dealt is not None:
            return microbatch.dealt.samples.get(dp, Rows())
        size, dp_size = microbatch.group_size, self.source.data_parallel_size
        own = Interval(dp * size // dp_size, (dp + 1) * size // dp_size)
        return Rows.of([own.clip(microbatch.place).shift(-microbatch.first)])

    def items_made(self, microbatch: Microbatch, *, dp: int) -> int:
        """Items of a microbatch, such as images, that a replica of the source turns into rows."""
        if microbatch.dealt is not None:
            return microbatch.dealt.num_items(dp)
        offsets = microbatch.offsets
        rows = sum(
            offsets[stop] - offsets[first] for first, stop in self.samples_made(microbatch, dp=dp)
        )
        return rows // self.item_rows

    def _derive(
        self,
        direction: Direction,
        microbatch: Microbatch,
        of_source: Selection,
        of_destination: Selection,
    ) -> Route:
        find = route if direction == "activation" else gradient_route
        return find(
            self.produced(microbatch, selection=of_source),
            self.kept(microbatch, selection=of_destination),
            node_of=self.node_of,
        )

    def _arrivals(self, own: Coordinates, microbatch: Microbatch, derive: "_Derive") -> Route:
        samples = self._samples_kept(own)
        if not (self._source_has_replicas and self._destination_has_replicas):
            return derive(Selection(samples=samples), Selection(samples=samples, position=own))
        samples = self._whole_replicas(self._whole_shares(samples, microbatch))
        return derive(Selection(samples=samples), Selection(samples=samples))

    def _departures(self, own: Coordinates, microbatch: Microbatch, derive: "_Derive") -> Route:
        samples = self.samples_made(microbatch, dp=own.dp)
        if self._destination_has_replicas:
            samples = self._whole_replicas(samples)
        return derive(Selection(samples=samples), Selection(samples=samples))

    def _gradient_arrivals(
        self, own: Coordinates, microbatch: Microbatch, derive: "_Derive"
    ) -> Route:
        samples = self.samples_made(microbatch, dp=own.dp)
        if not (self._source_has_replicas and self._destination_has_replicas):
            return derive(Selection(samples=samples, position=own), Selection(samples=samples))
        samples = self._whole_shares(self._whole_replicas(samples), microbatch)
        return derive(Selection(samples=samples), Selection(samples=samples))

    def _gradient_departures(
        self, own: Coordinates, microbatch: Microbatch, derive: "_Derive"
    ) -> Route:
        samples = self._samples_kept(own)
        if not self._source_has_replicas:
            return derive(Selection(samples=samples), Selection(samples=samples, position=own))
        samples = self._whole_shares(samples, microbatch)
        return derive(Selection(samples=samples), Selection(samples=samples))

    def _table_of(self, microbatch: Microbatch, sample: int) -> ShardTable:
        """Who keeps which positions of a sample."""
        if not isinstance(self.sharding, MaskedSharding):
            return self._table
        assert microbatch.sequences is not None, "sequences follow from the facts of samples"
        first = sample // self.samples_per_replica * self.samples_per_replica
        of_replica = microbatch.sequences[first : first + self.samples_per_replica]
        local_length = self.sharding.local_length(of_replica)
        return self.sharding.table(microbatch.sequences[sample], local_length=local_length)

    @cached_property
    def _table(self) -> ShardTable:
        assert isinstance(self.sharding, SequenceSharding), "whole sequences have no table"
        return ShardTable.of(self.sharding)

    @property
    def _source_has_replicas(self) -> bool:
        """Whether several ranks make the same rows."""
        return self.source.tensor_model_parallel_size > 1

    @property
    def _destination_has_replicas(self) -> bool:
        """Whether several ranks keep the same rows, with the same gradient."""
        split = self.sharding is not None and self.sharding.tp > 1
        return self.destination.tensor_model_parallel_size > 1 and not split

    def _samples_kept(self, position: Coordinates) -> Rows:
        first = position.dp * self.samples_per_replica
        return Rows.of([Interval(first, first + self.samples_per_replica)])

    def _whole_replicas(self, samples: Rows) -> Rows:
        """All samples of the destination's replicas that run some samples."""
        size = self.samples_per_replica
        return Rows.of(
            Interval(start // size * size, -(-stop // size) * size) for start, stop in samples
        )

    def _whole_shares(self, samples: Rows, microbatch: Microbatch) -> Rows:
        """All samples of the source's replicas that run some samples."""
        return Rows.of(self._shares(samples, microbatch))

    def _shares(self, samples: Rows, microbatch: Microbatch) -> Iterator[Interval]:
        if microbatch.dealt is not None:
            dps = {dp for each in samples for dp in microbatch.dealt.replicas(each)}
            for dp in dps:
                yield from microbatch.dealt.samples[dp]
            return
        for each in samples:
            dps = replicas_of(
                each.shift(microbatch.first),
                num_samples=microbatch.group_size,
                data_parallel_size=self.source.data_parallel_size,
            )
            for dp in dps:
                yield from self.samples_made(microbatch, dp=dp)


_Derive = Callable[[Selection, Selection], Route]


def _position(placement: ModulePlacement, rank: int, *, stage: int) -> Coordinates | None:
    """Place of a rank in a module, if it hosts that stage."""
    if rank not in placement.ranks:
        return None
    position = placement.coordinates(rank)
    return position if position.pp == stage else None


def _part(rank: int, *, arriving: Route | None, leaving: Route | None) -> Route:
    """Joins what reaches a rank and what leaves it."""
    legs, gathers, held, wanted = [], [], {}, {}
    if arriving is not None:
        legs += [leg for leg in arriving.legs if leg.destination == rank]
        gathers += [gather for gather in arriving.gathers if rank in gather.ranks]
        wanted[rank] = arriving.wanted.get(rank, Rows())
    if leaving is not None:
        legs += [leg for leg in leaving.legs if leg.source == rank != leg.destination]
        held[rank] = leaving.held.get(rank, Rows())
    return Route(held=held, wanted=wanted, legs=tuple(legs), gathers=tuple(gathers))
