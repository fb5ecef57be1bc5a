"""What a rank holds while a plan runs."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch.distributed as dist

from megatron_mosaic.comm.groups import GroupFactory
from megatron_mosaic.host.agreement import Agreement
from megatron_mosaic.host.channels import ChannelSet
from megatron_mosaic.host.groups import ModuleGroups
from megatron_mosaic.host.parallel_state_scope import ParallelStateScope
from megatron_mosaic.host.randomness import ModuleRandomness
from megatron_mosaic.layout.plan import Plan

if TYPE_CHECKING:
    from megatron_mosaic.host.runner import ModuleRunner


@dataclass(kw_only=True)
class Runtime:
    """A rank's share of a plan.

    Args:
        plan: The plan.
        rank: Global rank.
        hosted: Groups of the modules on this rank, by name.
        alone: This rank's group of one.
        host_group: Group of the world that works on host memory.
        channels: Edges that begin or end on this rank.
        agreement: Makes an error on one rank an error on all.
        factory: Creates further groups, on all ranks alike.
        runners: Modules on this rank, once they are built.
        trained: Part of the weights that trains, by module and part, once they are built.
    """

    plan: Plan
    rank: int
    hosted: dict[str, ModuleGroups]
    alone: dist.ProcessGroup
    host_group: dist.ProcessGroup
    channels: ChannelSet
    agreement: Agreement
    factory: GroupFactory
    randomness: ModuleRandomness = field(default_factory=ModuleRandomness)
    runners: "dict[str, ModuleRunner]" = field(default_factory=dict)
    trained: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def scope_of(self, module: str) -> ParallelStateScope:
        """Parallel state of one module on this rank."""
        return ParallelStateScope(self.hosted[module].collection)
