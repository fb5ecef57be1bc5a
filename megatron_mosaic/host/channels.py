"""Channels of a rank: what carries each edge's activations and gradients."""

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist

from megatron_mosaic.comm.boundary import BoundaryChannel, BoundaryRoutes
from megatron_mosaic.comm.exchange import Exchange
from megatron_mosaic.comm.groups import GroupFactory, warm_up
from megatron_mosaic.comm.pipeline import PipelineChannel, PipelineLink
from megatron_mosaic.engine.walk import Channel
from megatron_mosaic.layout.placement import ModulePlacement
from megatron_mosaic.layout.plan import Plan
from megatron_mosaic.schedule.schedule import Schedule
from megatron_mosaic.schedule.steps import (
    Edge,
    TransferKind,
    communicators,
    edges_of,
    has_gradient,
    participants,
)

KINDS: tuple[TransferKind, ...] = ("activation", "gradient")


class ChannelSet:
    """Creates a communicator for every edge and direction, and later the channels on them.

    Args:
        plan: The plan.
        factory: Creates groups, those of the modules already.
        rank: This rank.

    Note:
        Collective over the world.
    """

    def __init__(self, plan: Plan, factory: GroupFactory, *, rank: int) -> None:
        self._plan = plan
        self._rank = rank
        self._groups: dict[tuple[TransferKind, Edge], dist.ProcessGroup] = {}
        self._replicas: dict[str, dist.ProcessGroup] = {}
        self.routes: dict[Edge, BoundaryRoutes] = {}
        self.open: dict[tuple[TransferKind, Edge], Channel] = {}
        for edge in edges_of(plan):
            kinds = KINDS if has_gradient(plan, edge) else KINDS[:1]
            for kind in kinds:
                self._create_groups(kind, edge, factory)
        for placement in plan.modules.values():
            self._find_replicas(placement, factory)
        self._warm_up()

    def open_all(
        self,
        *,
        hidden_size: int,
        row_widths: Mapping[str, int],
        sequence_length: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Opens this rank's channels, once the sizes of what they carry are known.

        Args:
            hidden_size: Width of the language model's hidden states.
            row_widths: Width of the rows that each module makes.
            sequence_length: Tokens of a sample in the language model's pipeline.
            dtype: Type of all activations.
            device: Where they live.
        """
        for (kind, edge), group in self._groups.items():
            if edge.source == edge.destination:
                placement = self._plan.modules[edge.source]
                shard = placement.tensor_model_parallel_size if placement.sequence_parallel else 1
                shape = (sequence_length // shard, self._plan.micro_batch_size, hidden_size)
                self.open[kind, edge] = PipelineChannel(
                    self._link(kind, edge, group, shape=shape, dtype=dtype, device=device)
                )
                continue
            receiver = edge.destination if kind == "activation" else edge.source
            exchange = Exchange(
                group=group,
                gather_group=self._replicas.get(receiver),
                hidden_size=row_widths[edge.source],
                dtype=dtype,
                device=device,
            )
            routes = self.routes.setdefault(edge, self._routes_of(edge))
            self.open[kind, edge] = BoundaryChannel(kind, routes, exchange, rank=self._rank)

    def begin(self, rows: Mapping[str, tuple[int, ...]], *, schedule: Schedule) -> None:
        """Takes the rows that each module makes of every sample of the next step."""
        for edge, routes in self.routes.items():
            routes.begin(rows[edge.source], groups=_tasks_of(schedule, self._plan, edge.source))

    def rows_made(self, module: str, microbatches: Sequence[int]) -> int:
        """Boundary rows that this rank makes in one task of an encoder."""
        routes = next(routes for edge, routes in self.routes.items() if edge.source == module)
        return sum(routes.rows_made(m, rank=self._rank) for m in microbatches)

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

    def _routes_of(self, edge: Edge) -> BoundaryRoutes:
        modules = self._plan.modules
        return BoundaryRoutes(
            modules[edge.source],
            modules[edge.destination],
            samples_per_replica=self._plan.micro_batch_size,
        )

    def _link(
        self,
        kind: TransferKind,
        edge: Edge,
        group: dist.ProcessGroup,
        *,
        shape: tuple[int, int, int],
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
            shape=shape,
            dtype=dtype,
            device=device,
        )


def _tasks_of(schedule: Schedule, plan: Plan, module: str) -> list[tuple[int, ...]]:
    """Microbatches of every forward task of a module's last stage."""
    last = plan.modules[module].pipeline_model_parallel_size - 1
    rank = plan.modules[module].stage_ranks(last)[0]
    return [
        task.microbatches
        for task in schedule.tasks[rank]
        if task.module == module and task.stage == last and task.kind == "F"
    ]
