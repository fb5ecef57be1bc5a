"""Modules of a rank in tests of reading, which needs their places and no process groups."""


def hosted_modules(plan, rank):
    """Groups of the modules of a rank by name, without any process group."""
    from megatron.core.process_groups_config import ProcessGroupCollection

    from megatron_mosaic.host.groups import ModuleGroups

    return {
        name: ModuleGroups(
            placement=plan.modules[name],
            position=plan.modules[name].coordinates(rank),
            expert_position=plan.modules[name].expert_coordinates(rank),
            collection=ProcessGroupCollection(),
        )
        for name in plan.modules_of(rank)
    }
