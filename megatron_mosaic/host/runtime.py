"""What a rank holds while a plan runs."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch.distributed as dist

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
        data_group: Another one, of the readers of data: their exchanges stay open during a step.
        channels: Edges that begin or end on this rank.
        agreement: Makes an error on one rank an error on all.
        runners: Modules on this rank, once they are built.
    """

    plan: Plan
    rank: int
    hosted: dict[str, ModuleGroups]
    alone: dist.ProcessGroup
    host_group: dist.ProcessGroup
    data_group: dist.ProcessGroup
    channels: ChannelSet
    agreement: Agreement
    randomness: ModuleRandomness = field(default_factory=ModuleRandomness)
    runners: "dict[str, ModuleRunner]" = field(default_factory=dict)

    def scope_of(self, module: str) -> ParallelStateScope:
        """Parallel state of one module on this rank."""
        return ParallelStateScope(self.hosted[module].collection)
