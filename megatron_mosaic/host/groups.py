"""Process groups of every module, from the plan's rank lists."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_mosaic.comm.groups import GroupFactory
from megatron_mosaic.layout.grid import Coordinates, ExpertCoordinates
from megatron_mosaic.layout.placement import Axis, ExpertAxis, ModulePlacement
from megatron_mosaic.layout.plan import Plan
from megatron_mosaic.schedule.lanes import has_lanes

# Megatron's name of a group: the axes along which its members differ. The gtp_remat ones are
# groups of one, or those without it, because that axis is not in a plan.
AXES_OF_FIELD: dict[str, tuple[Axis, ...]] = {
    "tp": ("tp",),
    "cp": ("cp",),
    "pp": ("pp",),
    "mp": ("tp", "pp"),
    "tp_cp": ("tp", "cp"),
    "tp_dp_cp": ("tp", "cp", "dp"),
    "dp": ("dp",),
    "dp_cp": ("cp", "dp"),
    "dp_cp_gtp_remat": ("cp", "dp"),
    "intra_dp_cp": ("cp", "dp"),
    "inter_dist_opt": (),
    "intra_dist_opt": ("tp", "cp", "dp", "pp"),
    "gtp_remat": (),
}
EXPERT_AXES_OF_FIELD: dict[str, tuple[ExpertAxis, ...]] = {
    "ep": ("ep",),
    "expt_tp": ("expt_tp",),
    "tp_ep": ("expt_tp", "ep"),
    "tp_ep_pp": ("expt_tp", "ep", "pp"),
    "tp_ep_pp_with_egtp_remat": ("expt_tp", "ep", "pp"),
    "expt_dp": ("expt_dp",),
    "expt_dp_gtp_remat": ("expt_dp",),
    "intra_expt_dp": ("expt_dp",),
    "expt_gtp_remat": (),
}


@dataclass(frozen=True, slots=True)
class StageGroup:
    """Stands where Megatron's modules expect a pipeline's process group: they ask for the stage.

    So a stage is built, and runs, as if its pipeline had a rank for every stage, also where a rank
    has several. Only who communicates needs the true group, and has it from elsewhere.

    Args:
        index: The stage.
        ranks: Global rank of every stage of the pipeline.
    """

    index: int
    ranks: tuple[int, ...]

    def rank(self) -> int:
        """The stage."""
        return self.index

    def size(self) -> int:
        """Stages of the pipeline."""
        return len(self.ranks)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModuleGroups:
    """Groups of one module that this rank is in, and its place in the module's grids.

    Args:
        placement: The module's placement.
        position: Place in the module's grid.
        expert_position: Place in its experts' grid.
        collection: The groups.
        virtual_stage: Which of the rank's stages this is, from 0.
    """

    placement: ModulePlacement
    position: Coordinates
    expert_position: ExpertCoordinates
    collection: ProcessGroupCollection
    virtual_stage: int = 0

    @property
    def stage(self) -> int:
        """Number of the stage among all of the module."""
        return self.virtual_stage * self.placement.pipeline_model_parallel_size + self.position.pp

    @property
    def is_first_stage(self) -> bool:
        """Whether this is the module's first stage."""
        return self.stage == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this is the module's last stage."""
        return self.stage == self.placement.num_stages - 1

    @property
    def is_first_of_replica(self) -> bool:
        """Whether this is the first rank of a data-parallel replica: one of many alike."""
        return (self.position.tp, self.position.cp, self.position.pp) == (0, 0, 0)

    @property
    def pipeline(self) -> StageGroup:
        """The stage among those that its data runs through."""
        tp, cp, dp, _ = self.position
        places = [stage % self.placement.shape.pp for stage in range(self.placement.num_stages)]
        ranks = tuple(self.placement.rank_at(tp=tp, cp=cp, dp=dp, pp=place) for place in places)
        return StageGroup(self.stage, ranks)

    def of_stages(self) -> "tuple[ModuleGroups, ...]":
        """Groups of each stage on this rank; of several, each sees a pipeline of all stages."""
        virtual = self.placement.virtual_pipeline_model_parallel_size
        if virtual == 1:
            return (self,)
        return tuple(self._of_stage(virtual_stage) for virtual_stage in range(virtual))

    def _of_stage(self, virtual_stage: int) -> "ModuleGroups":
        own = replace(self, virtual_stage=virtual_stage, collection=copy.copy(self.collection))
        own.collection.pp = own.pipeline  # type: ignore[assignment]
        return own


def module_groups(plan: Plan, factory: GroupFactory, *, rank: int) -> dict[str, ModuleGroups]:
    """Creates the groups of all modules. Returns those of the modules that ``rank`` hosts.

    Note:
        Collective over the world.
    """
    alone = factory.alone(plan.world_size)
    hosted = {}
    for name, placement in plan.modules.items():
        if has_lanes(plan):
            # On a group of one there is nobody to wait for, but lanes would wait for each other.
            alone = factory.alone(plan.world_size, scope=f"{name}.alone")
        fields = _create_fields(placement, factory, rank=rank, alone=alone)
        if rank in placement.ranks:
            hosted[name] = ModuleGroups(
                placement=placement,
                position=placement.coordinates(rank),
                expert_position=placement.expert_coordinates(rank),
                collection=ProcessGroupCollection(**fields),
            )
    return hosted


def lone_collection(alone: dist.ProcessGroup) -> ProcessGroupCollection:
    """Returns a collection of groups of one.

    The stock loop reads a single collection per rank, to reduce losses, the gradient norm and
    success flags. A rank may host several modules or none, and all of those are already global
    when the loop sees them: so it reduces over nobody.
    """
    fields: dict[str, dist.ProcessGroup] = dict.fromkeys(
        (*AXES_OF_FIELD, *EXPERT_AXES_OF_FIELD), alone
    )
    return ProcessGroupCollection(**fields, embd=alone, pos_embd=alone)


def _create_fields(
    placement: ModulePlacement, factory: GroupFactory, *, rank: int, alone: dist.ProcessGroup
) -> Mapping[str, dist.ProcessGroup | None]:
    fields: dict[str, dist.ProcessGroup | None] = {}

    def create(field: str, groups: list[tuple[int, ...]], scope: str) -> None:
        fields[field] = alone
        for ranks in groups:
            if len(ranks) > 1:
                fields[field] = factory.group(ranks, scope=scope) or fields[field]

    for field, axes in AXES_OF_FIELD.items():
        create(field, placement.groups(*axes), placement.name)
    # Experts exchange tokens while gradients are reduced: not on one communicator, even where the
    # members are the same.
    scope = f"{placement.name}.experts" if placement.splits_experts else placement.name
    for field, axes in EXPERT_AXES_OF_FIELD.items():
        create(field, placement.expert_groups(*axes), scope)
    for pipeline in placement.groups("pp"):
        ends = (pipeline[0], pipeline[-1])
        if len(pipeline) == 1:
            continue
        # Megatron reads "not in the embedding group" from None, not from a group of one.
        both = factory.group(ends, scope=f"{placement.name}.embd")
        if rank in pipeline:
            fields["embd"] = both
            fields["pos_embd"] = alone if rank == pipeline[0] else None
    fields.setdefault("embd", alone)
    fields.setdefault("pos_embd", alone)
    return fields


def trained_collection(
    groups: ModuleGroups | None,
    placement: ModulePlacement,
    stages: Sequence[int],
    factory: GroupFactory,
) -> ProcessGroupCollection | None:
    """Restricts a module's groups to the ranks whose pipeline stages train something.

    The optimizer works on these alone: it reduces norms over them, and the first of them writes
    what a checkpoint holds once for all.

    Args:
        groups: The module's groups on this rank; None if it does not host the module.
        placement: The module's placement.
        stages: Stages with a trainable weight, ascending.
        factory: Creates the groups of fewer stages.

    Returns:
        None on ranks of other stages, and on those that do not host the module.

    Note:
        Collective over the world, unless a stage trains on every rank or on none.
    """
    places = {stage % placement.pipeline_model_parallel_size for stage in stages}
    here = groups if groups is not None and groups.position.pp in places else None
    if not places or len(places) == placement.pipeline_model_parallel_size:
        return here.collection if here else None
    members = {rank for stage in stages for rank in placement.stage_ranks(stage)}
    restricted = copy.copy(here.collection) if here else None
    over_stages = {
        field: placement.groups(*axes) for field, axes in AXES_OF_FIELD.items() if "pp" in axes
    } | {
        field: placement.expert_groups(*axes)
        for field, axes in EXPERT_AXES_OF_FIELD.items()
        if "pp" in axes
    }
    for field, groups_of_field in over_stages.items():
        for ranks in groups_of_field:
            kept = [rank for rank in ranks if rank in members]
            group = factory.group(kept, scope=_scope_of_trained(placement, kept))
            if restricted is not None and group is not None:
                setattr(restricted, field, group)
    return restricted


def _scope_of_trained(placement: ModulePlacement, ranks: Sequence[int]) -> str:
    return "alone" if len(ranks) == 1 else f"{placement.name}.trained"
