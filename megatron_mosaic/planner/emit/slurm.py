"""Batch scripts of Slurm."""

from megatron_mosaic.layout.plan import Plan
from megatron_mosaic.planner.emit.emission import Emission, Launch, shell_lines
from megatron_mosaic.planner.emit.torchrun import nodes_of, script_options

_HEAD = """\
#!/bin/bash
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node={gpus}
#SBATCH --exclusive

# Megatron demands it of GPUs before Blackwell.
export CUDA_DEVICE_MAX_CONNECTIONS=1
HOST=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
"""


def emit_slurm(plan: Plan, launch: Launch) -> Emission:
    """Writes a script for ``sbatch`` that starts torchrun on every node."""
    nodes, processes = nodes_of(plan, launch)
    command = shell_lines(
        ("--nnodes", f"{nodes}"),
        ("--nproc-per-node", f"{processes}"),
        ("--rdzv-backend", "c10d"),
        ("--rdzv-id", "RDZV_ID"),
        ("--rdzv-endpoint", "RDZV_ENDPOINT"),
        *script_options(launch),
        head="srun torchrun",
    )
    # Variables of the shell, which quoting would make into text.
    command = command.replace("RDZV_ID", '"$SLURM_JOB_ID"').replace(
        "RDZV_ENDPOINT", '"$HOST:29500"'
    )
    return Emission(
        text=_HEAD.format(nodes=nodes, gpus=processes) + command + ' \\\n  "$@"',
        notes=("give the arguments of the script to sbatch, behind the name of this file",),
    )
