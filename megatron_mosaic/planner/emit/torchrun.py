"""Launch lines of torchrun."""

from megatron_mosaic.layout.plan import Plan
from megatron_mosaic.planner.emit.emission import (
    Emission,
    InexpressibleError,
    Launch,
    environment_notes,
    shell_lines,
)

Option = tuple[str, ...]


def emit_torchrun(plan: Plan, launch: Launch) -> Emission:
    """Writes the line that starts a script under the plan; every node runs it."""
    nodes, processes = nodes_of(plan, launch)
    where: list[Option] = [("--standalone",)]
    notes = ["add the arguments of the script at the end", *environment_notes(plan)]
    if nodes > 1:
        where = [
            ("--nnodes", f"{nodes}"),
            ("--rdzv-backend", "c10d"),
            ("--rdzv-endpoint", "HOST:29500"),
        ]
        notes.append("HOST is the name of one of the nodes")
    text = shell_lines(
        *where, ("--nproc-per-node", f"{processes}"), *script_options(launch), head="torchrun"
    )
    return Emission(text=text, notes=tuple(notes))


def script_options(launch: Launch) -> list[Option]:
    """Script and plan, as every launcher ends with them."""
    return [
        ("-m", "megatron_mosaic.run", launch.script),
        ("--mosaic-plan", launch.plan_path),
    ]


def nodes_of(plan: Plan, launch: Launch) -> tuple[int, int]:
    """Nodes of a run, and processes on each.

    Raises:
        InexpressibleError: The nodes would have unlike numbers of processes.
    """
    if plan.world_size <= launch.gpus_per_node:
        return 1, plan.world_size
    if plan.world_size % launch.gpus_per_node:
        raise InexpressibleError(
            f"world_size={plan.world_size} must be a multiple of "
            f"gpus_per_node={launch.gpus_per_node}, as all nodes start as many processes"
        )
    return plan.world_size // launch.gpus_per_node, launch.gpus_per_node
