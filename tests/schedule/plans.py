"""Plans for the schedule's tests, also those that this version of the runtime refuses."""

from unittest.mock import patch

from megatron_mosaic.layout.placement import ModulePlacement
from megatron_mosaic.layout.plan import Plan, ScheduleChoice, ScheduleKind
from megatron_mosaic.schedule.schedule import Schedule


def place(
    name: str,
    *ranks: int,
    tp: int = 1,
    cp: int = 1,
    dp: int = 1,
    pp: int = 1,
    vpp: int = 1,
    ep: int = 1,
    expt_tp: int | None = None,
    trainable: tuple[str, ...] | None = None,
) -> ModulePlacement:
    return ModulePlacement(
        name=name,
        ranks=ranks,
        tensor_model_parallel_size=tp,
        context_parallel_size=cp,
        data_parallel_size=dp,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=vpp,
        expert_model_parallel_size=ep,
        expert_tensor_parallel_size=expt_tp,
        trainable=trainable,
    )


def plan_of(
    kind: ScheduleKind,
    *placements: ModulePlacement,
    num_microbatches: int,
    group: int | None = None,
    edges: tuple[tuple[str, str], ...] | None = None,
    world_size: int | None = None,
    max_live: int | None = None,
    ahead: bool = False,
) -> Plan:
    """Joins every encoder to the language model unless ``edges`` says otherwise."""
    modules = {placement.name: placement for placement in placements}
    if edges is None:
        edges = tuple((name, "language") for name in modules if name != "language")
    # The schedules know several encoders, stages of encoders and context parallelism; what the
    # runtime cannot do yet is refused elsewhere.
    with patch("megatron_mosaic.layout.plan.refuse_unsupported", new=lambda plan: None):
        return Plan(
            world_size=world_size or 1 + max(max(placement.ranks) for placement in placements),
            global_batch_size=num_microbatches * modules["language"].data_parallel_size,
            micro_batch_size=1,
            modules=modules,
            edges=edges,
            schedule=ScheduleChoice(kind=kind, encoder_group=group, max_live=max_live, ahead=ahead),
        )


def table(schedule: Schedule) -> list[str]:
    """Tasks of every rank; the module's first letter stands in front, none for language."""
    return [
        " ".join(
            f"{'' if task.module == 'language' else task.module[0]}{str(task).split()[0]}"
            for task in tasks
        )
        for tasks in schedule.tasks
    ]
