"""What a rank holds while a plan runs."""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch.distributed as dist

from megatron_mosaic.comm.groups import GroupFactory
from megatron_mosaic.host.agreement import Agreement
from megatron_mosaic.host.channels import ChannelSet, RowFacts
from megatron_mosaic.host.groups import ModuleGroups
from megatron_mosaic.host.randomness import ModuleRandomness
from megatron_mosaic.layout.plan import Plan
from megatron_mosaic.schedule.graph import Stage
from megatron_mosaic.sharing.lane import Lanes

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
        factory: Creates further groups, on all ranks alike.
        lanes: Lanes of the modules on this rank, where several run at the same time.
        runners: Stages of modules on this rank, once they are built.
        row_facts: Rows of every module of the plan, once all are built.
        trained: Part of the weights that trains, by module and part, once they are built.
    """

    plan: Plan
    rank: int
    hosted: dict[str, ModuleGroups]
    alone: dist.ProcessGroup
    host_group: dist.ProcessGroup
    data_group: dist.ProcessGroup
    channels: ChannelSet
    agreement: Agreement
    factory: GroupFactory
    lanes: Lanes | None = None
    randomness: ModuleRandomness = field(default_factory=ModuleRandomness)
    runners: "dict[Stage, ModuleRunner]" = field(default_factory=dict)
    row_facts: dict[str, RowFacts] = field(default_factory=dict)
    trained: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    @property
    def modules(self) -> "dict[str, ModuleRunner]":
        """Of each module on this rank, one of its stages: for what all of them have in common."""
        return {runner.name: runner for runner in self.runners.values()}


def share_row_facts(runtime: Runtime, args: argparse.Namespace) -> None:
    """Tells every rank what the rows of all modules are: who receives some did not build them.

    Note:
        Collective over the world.
    """
    own = {
        runner.name: RowFacts(
            width=runner.boundary.width,
            flops=runner.boundary.flops_per_row(args, trained=runtime.trained.get(runner.name, {})),
            item=runner.boundary.item,
            item_cost=runner.boundary.item_cost(),
            keeps_parts=runner.boundary.keeps_parts,
            sequence_length=args.decoder_seq_length or args.seq_length,
        )
        for runner in runtime.runners.values()
        if runner.groups.is_last_stage
    }
    every: list[dict[str, RowFacts]] = [{}] * dist.get_world_size()
    dist.all_gather_object(every, own, group=runtime.host_group)
    runtime.row_facts = {name: facts for some in every for name, facts in some.items()}
