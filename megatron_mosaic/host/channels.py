"""Channels of a rank: what carries each edge's activations and gradients."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType

import torch
import torch.distributed as dist

from megatron_mosaic.comm.boundary import (
    BoundaryChannel,
    BoundaryRoutes,
    BoundaryShape,
    ItemShape,
    Samples,
    TaskOwners,
)
from megatron_mosaic.comm.exchange import Exchange
from megatron_mosaic.comm.groups import GroupFactory, warm_up
from megatron_mosaic.comm.pipeline import PipelineChannel, PipelineLink, Shape
from megatron_mosaic.engine.walk import Channel
from megatron_mosaic.layout.item_costs import ItemCost
from megatron_mosaic.layout.placement import LANGUAGE, ModulePlacement
from megatron_mosaic.layout.plan import Plan
from megatron_mosaic.layout.sequences import MaskedSharding, SampleSequence, sharding_of
from megatron_mosaic.schedule.schedule import Schedule
from megatron_mosaic.schedule.steps import (
    Edge,
    TransferKind,
    communicators,
    edges_of,
    has_gradient,
    participants,
    tasks_of,
)

KINDS: tuple[TransferKind, ...] = ("activation", "gradient")


@dataclass(frozen=True, kw_only=True, slots=True)
class RowFacts:
    """What every rank knows of the rows of a module.

    Args:
        width: Values of a row that it makes.
        flops: Operations of forward and backward pass behind such a row.
        item: What it turns into rows.
        item_cost: What this costs, by its rows.
        keeps_parts: Whether a rank with a part of each sequence is sent the rows of its part only.
        sequence_length: Tokens of a sample in the language model, which the script settles when it
            builds a module: ranks without any do not know.
    """

    width: int
    flops: float
    item: ItemShape
    item_cost: ItemCost
    keeps_parts: bool
    sequence_length: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ActivationSizes:
    """Sizes of what the channels carry.

    Args:
        hidden_size: Width of the language model's hidden states.
        sequence_length: Tokens of a sample in the language model.
        rows: Rows that each module makes, and how it takes those of others.
        dtype: Type of all activations.
    """

    hidden_size: int
    sequence_length: int
    rows: Mapping[str, RowFacts]
    dtype: torch.dtype


class ChannelSet:
    """Creates a communicator for every edge and direction, and later the channels on them.

    Args:
        plan: The plan.
        factory: Creates groups, those of the modules already.
        rank: This rank.
        nodes: Node of every rank.

    Note:
        Collective over the world.
    """

    def __init__(
        self, plan: Plan, factory: GroupFactory, *, rank: int, nodes: Sequence[int]
    ) -> None:
        self._plan = plan
        self._rank = rank
        self._node_of = nodes.__getitem__ if len(set(nodes)) > 1 else None
        self._groups: dict[tuple[TransferKind, Edge], dist.ProcessGroup] = {}
        self._replicas: dict[str, dist.ProcessGroup] = {}
        self._sequences: Sequence[SampleSequence] = ()
        self.routes: dict[Edge, BoundaryRoutes] = {}
        self.open: dict[tuple[TransferKind, Edge], Channel] = {}
        for edge in edges_of(plan):
            kinds = KINDS if has_gradient(plan, edge) else KINDS[:1]
            for kind in kinds:
                self._create_groups(kind, edge, factory)
        for placement in plan.modules.values():
            self._find_replicas(placement, factory)
        self._warm_up()

    def open_all(self, sizes: ActivationSizes, *, device: torch.device) -> None:
        """Opens this rank's channels, once the sizes of what they carry are known.

        Args:
            sizes: Sizes of activations.
            device: Where they live.
        """
        for edge in edges_of(self._plan):
            hosts = {edge.source, edge.destination} & set(self._plan.modules_of(self._rank))
            if edge.source != edge.destination and hosts:
                self.routes[edge] = self._routes_of(edge, sizes)
        for (kind, edge), group in self._groups.items():
            if edge.source == edge.destination:
                link = self._link(kind, edge, group, dtype=sizes.dtype, device=device)
                shape_of = partial(self._hidden_shape, edge.source, sizes)
                self.open[kind, edge] = PipelineChannel(link, shape_of=shape_of)
                continue
            receiver = edge.destination if kind == "activation" else edge.source
            exchange = Exchange(
                group=group,
                gather_group=self._replicas.get(receiver),
                hidden_size=sizes.rows[edge.source].width,
                dtype=sizes.dtype,
                device=device,
            )
            self.open[kind, edge] = BoundaryChannel(
                kind, self.routes[edge], exchange, rank=self._rank
            )

    def begin(
        self,
        samples: Mapping[str, Samples],
        *,
        schedule: Schedule,
        owners: Mapping[str, TaskOwners] = MappingProxyType({}),
        sequences: Sequence[SampleSequence] = (),
    ) -> None:
        """Takes what differs between steps.

        Args:
            samples: Where the rows belong that each module makes of every sample of the step.
            schedule: The step's.
            owners: Replica of every item, of modules whose items are dealt.
            sequences: What decides which rank of the language model keeps which tokens of every
                sample, where their masks do.
        """
        self._sequences = sequences
        for edge, routes in self.routes.items():
            routes.begin(
                samples[edge.source],
                groups=tasks_of(schedule, self._plan, edge.source),
                owners=owners.get(edge.source, {}),
                sequences=sequences,
            )

    def begin_ahead(
        self,
        samples: Mapping[str, Samples],
        *,
        schedule: Schedule,
        owners: Mapping[str, TaskOwners] = MappingProxyType({}),
    ) -> None:
        """Makes the modules that run ahead take the next step's samples."""
        for edge, routes in self.routes.items():
            if edge.source in schedule.ahead:
                routes.begin_ahead(samples[edge.source], owners=owners.get(edge.source, {}))

    def rows_made(self, module: str, microbatches: Sequence[int]) -> int:
        """Boundary rows that this rank makes in one task of an encoder's last stage."""
        routes = next(routes for edge, routes in self.routes.items() if edge.source == module)
        return sum(routes.rows_made(m, rank=self._rank) for m in microbatches)

    def items_made(self, module: str, microbatches: Sequence[int]) -> int:
        """Items, such as images, that this rank's replica of an encoder takes in one task."""
        routes = next(routes for edge, routes in self.routes.items() if edge.source == module)
        dp = self._plan.modules[module].coordinates(self._rank).dp
        return sum(routes.items_made(m, dp=dp) for m in microbatches)

    def received_bytes(self, num_microbatches: int) -> dict[str, int]:
        """Bytes that the last step brought to this rank over boundaries, rows and gradients.

        Returns:
            Bytes by the module that made the rows.
        """
        received: dict[str, int] = {}
        for (_, edge), channel in self.open.items():
            if isinstance(channel, BoundaryChannel):
                own = sum(map(channel.received_bytes, range(num_microbatches)))
                received[edge.source] = received.get(edge.source, 0) + own
        return received

    def _create_groups(self, kind: TransferKind, edge: Edge, factory: GroupFactory) -> None:
        for ranks in communicators(self._plan, edge):
            group = factory.group(ranks, scope=f"{kind} {edge}")
            if group is not None:
                self._groups[kind, edge] = group

    def _find_replicas(self, placement: ModulePlacement, factory: GroupFactory) -> None:
        """Remembers the tensor-parallel replicas of this rank, which gather shares of rows."""
        for ranks in placement.groups("tp"):
            in_order = tuple(sorted(ranks))
            # Shares are numbered by ascending rank; the module's own group may have another order.
            scope = placement.name if ranks == in_order else f"{placement.name}.shares"
            group = factory.group(in_order, scope=scope) if len(ranks) > 1 else None
            if group is not None:
                self._replicas[placement.name] = group

    def _warm_up(self) -> None:
        for group in self._groups.values():
            warm_up(group, device=torch.device(torch.cuda.current_device()))

    def _routes_of(self, edge: Edge, sizes: ActivationSizes) -> BoundaryRoutes:
        modules = self._plan.modules
        source, destination = modules[edge.source], modules[edge.destination]
        sharding = None
        if sizes.rows[edge.destination].keeps_parts:
            sharding = sharding_of(destination, sequence_length=sizes.sequence_length)
        shape = BoundaryShape(
            samples_per_replica=self._plan.micro_batch_size,
            sharding=sharding,
            item=sizes.rows[edge.source].item,
        )
        return BoundaryRoutes(source, destination, shape=shape, node_of=self._node_of)

    def _hidden_shape(self, module: str, sizes: ActivationSizes, microbatch: int) -> Shape:
        """Shape ``[s, b, h]`` of a hidden state between two stages of a module."""
        if module != LANGUAGE:
            item = sizes.rows[module].item
            return (item.tokens, self.items_made(module, (microbatch,)), item.hidden_size)
        sharding = sharding_of(self._plan.language, sequence_length=sizes.sequence_length)
        tokens = sizes.sequence_length
        if isinstance(sharding, MaskedSharding):
            tokens = sharding.local_length(self._own_sequences(microbatch))
        elif sharding is not None:
            tokens = sharding.local_length
        return (tokens, self._plan.micro_batch_size, sizes.hidden_size)

    def _own_sequences(self, microbatch: int) -> Sequence[SampleSequence]:
        """Sequences of a microbatch that this rank's replica of the language model has."""
        language, size = self._plan.language, self._plan.micro_batch_size
        replica = microbatch * language.data_parallel_size + language.coordinates(self._rank).dp
        return self._sequences[replica * size : (replica + 1) * size]

    def _link(
        self,
        kind: TransferKind,
        edge: Edge,
        group: dist.ProcessGroup,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> PipelineLink:
        sources, destinations = participants(self._plan, edge)
        pair = next(
            (source, destination)
            for source, destination in zip(sources, destinations, strict=True)
            if self._rank in (source, destination)
        )
        source, destination = pair if kind == "activation" else reversed(pair)
        return PipelineLink(
            group=group,
            source=source,
            destination=destination,
            dtype=dtype,
            device=device,
        )
