"""Plans as launch lines: literal text, and what they refuse."""

import pytest

from megatron_mosaic.errors import PlanError
from megatron_mosaic.layout.plan import Plan
from megatron_mosaic.planner.emit.emission import Launch
from megatron_mosaic.planner.emit.formats import emit
from tests.planner.emitted import DISJOINT, LANGUAGE, emitted


def test_torchrun_starts_one_node_alone():
    assert emitted("torchrun", LANGUAGE).text == (
        "torchrun \\\n"
        "  --standalone \\\n"
        "  --nproc-per-node 8 \\\n"
        "  -m megatron_mosaic.run pretrain_vlm.py \\\n"
        "  --mosaic-plan plan.yaml"
    )


def test_torchrun_starts_nodes_that_meet():
    assert emitted("torchrun", DISJOINT, gpus_per_node=4).text == (
        "torchrun \\\n"
        "  --nnodes 4 \\\n"
        "  --rdzv-backend c10d \\\n"
        "  --rdzv-endpoint HOST:29500 \\\n"
        "  --nproc-per-node 4 \\\n"
        "  -m megatron_mosaic.run pretrain_vlm.py \\\n"
        "  --mosaic-plan plan.yaml"
    )


def test_slurm_starts_torchrun_on_every_node():
    assert (
        emitted("slurm", DISJOINT).text
        == """\
#!/bin/bash
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive

# Megatron demands it of GPUs before Blackwell.
export CUDA_DEVICE_MAX_CONNECTIONS=1
HOST=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun torchrun \\
  --nnodes 2 \\
  --nproc-per-node 8 \\
  --rdzv-backend c10d \\
  --rdzv-id "$SLURM_JOB_ID" \\
  --rdzv-endpoint "$HOST:29500" \\
  -m megatron_mosaic.run pretrain_vlm.py \\
  --mosaic-plan plan.yaml \\
  "$@\""""
    )


def test_slurm_on_one_node_asks_for_its_gpus_alone():
    text = emitted(
        "slurm",
        LANGUAGE.replace("\n    data_parallel_size: 2", "").replace("8", "4").replace("0-7", "0-3"),
    ).text

    assert "#SBATCH --nodes=1\n" in text
    assert "#SBATCH --gpus-per-node=4\n" in text


@pytest.mark.parametrize("form", ["torchrun", "slurm"])
def test_launchers_refuse_nodes_of_unlike_size(form):
    with pytest.raises(PlanError, match=r"world_size=16 must be a multiple of gpus_per_node=5, as"):
        emitted(form, DISJOINT, gpus_per_node=5)


def test_paths_are_quoted_for_the_shell():
    plan = Plan.loads(LANGUAGE, where="plan.yaml")
    launch = Launch(plan_path="my plan.yaml", script="a b.py", gpus_per_node=8)

    text = emit(plan, form="torchrun", launch=launch).text

    assert text.endswith("-m megatron_mosaic.run 'a b.py' \\\n  --mosaic-plan 'my plan.yaml'")
