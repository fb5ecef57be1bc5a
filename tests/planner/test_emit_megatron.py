"""Plans as arguments of stock Megatron: literal text, and what it refuses."""

import json
import os
import subprocess
import sys

import pytest

from megatron_mosaic.errors import PlanError
from megatron_mosaic.planner.candidate import plan_of
from megatron_mosaic.planner.planner import make_plan
from tests.planner.emitted import (
    HOMOGENEOUS,
    LANGUAGE,
    emitted,
    interleaved,
    split_into,
    words_of,
)
from tests.planner.test_plans import SMALL


def test_megatron_takes_a_language_model():
    assert emitted("megatron", LANGUAGE).text == (
        "--tensor-model-parallel-size 2 \\\n"
        "  --pipeline-model-parallel-size 2 \\\n"
        "  --sequence-parallel \\\n"
        "  --micro-batch-size 2 \\\n"
        "  --global-batch-size 64 \\\n"
        "  --recompute-granularity full \\\n"
        "  --recompute-method uniform \\\n"
        "  --recompute-num-layers 1"
    )


def test_megatron_takes_an_encoder_on_the_first_stage():
    emission = emitted("megatron", HOMOGENEOUS)

    assert emission.text == (
        "--tensor-model-parallel-size 2 \\\n"
        "  --pipeline-model-parallel-size 2 \\\n"
        "  --micro-batch-size 2 \\\n"
        "  --global-batch-size 64 \\\n"
        "  --decoder-first-pipeline-num-layers 14 \\\n"
        "  --freeze-ViT"
    )
    assert emission.notes == (
        "set CUDA_DEVICE_MAX_CONNECTIONS=1 in the environment of GPUs before Blackwell",
    )


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ([8, 8, 8, 8], []),
        ([5, 9, 9, 9], ["--decoder-first-pipeline-num-layers", "5"]),
        ([9, 9, 9, 5], ["--decoder-last-pipeline-num-layers", "5"]),
        (
            [7, 9, 9, 7],
            [
                *("--decoder-first-pipeline-num-layers", "7"),
                *("--decoder-last-pipeline-num-layers", "7"),
            ],
        ),
        ([7, 9, 15, 1], ["--pipeline-model-parallel-layout", "Et*7|t*9|t*15|tL"]),
    ],
)
def test_megatron_splits_stages_by_the_oldest_argument_that_can(layers, expected):
    words = words_of(emitted("megatron", split_into(layers)).text)

    assert words[words.index("--recompute-num-layers") + 2 :] == expected


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ("", ["--num-virtual-stages-per-pipeline-rank", "2"]),
        (
            "    layers_per_stage: [7, 8, 8, 9]\n",
            ["--pipeline-model-parallel-layout", "Et*7|t*8|t*8|t*9L"],
        ),
    ],
)
def test_megatron_takes_virtual_stages(layers, expected):
    words = words_of(emitted("megatron", interleaved(LANGUAGE, layers)).text)

    assert words[words.index("--recompute-num-layers") + 2 :] == expected


ACCEPTED = [
    LANGUAGE,
    split_into([5, 9, 9, 9]),
    split_into([9, 9, 9, 5]),
    split_into([7, 9, 9, 7]),
    split_into([7, 9, 15, 1]),
    LANGUAGE.replace("recompute: full", "recompute: selective"),
    LANGUAGE.replace("recompute: full", "expert_model_parallel_size: 2"),
]
# Megatron's own parser; arguments come as one list for each line, results go the same way.
PARSE = """
import json, sys
from megatron.training import arguments
arguments.get_device_arch_version = lambda: 9  # Hopper; the machine need not have a GPU
for line in sys.stdin.read().splitlines():
    sys.argv = ["script", *json.loads(line)]
    args = arguments.parse_args()
    arguments.validate_args(args, {})
    print("RESULT", args.data_parallel_size, args.global_batch_size, args.recompute_granularity)
"""
MODEL = (
    "--num-layers 32 --hidden-size 64 --num-attention-heads 4 --seq-length 32 --bf16 "
    "--max-position-embeddings 32 --lr 1e-4 --train-iters 1 --tokenizer-type NullTokenizer "
    "--vocab-size 128 --num-experts 2 --transformer-impl local"
)


def test_megatron_accepts_its_arguments():
    commands = [[*words_of(emitted("megatron", each).text), *MODEL.split()] for each in ACCEPTED]

    process = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PARSE],
        input="\n".join(map(json.dumps, commands)),
        env={
            **os.environ,
            "WORLD_SIZE": "8",
            "RANK": "1",
            "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        },
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )

    results = [line for line in process.stdout.splitlines() if line.startswith("RESULT")]
    assert process.returncode == 0, process.stderr[-2000:]
    assert results == [
        "RESULT 2 64 full",
        *["RESULT 1 64 full"] * 4,
        "RESULT 2 64 selective",
        "RESULT 2 64 None",
    ]


def test_megatron_leaves_other_freezing_to_the_script():
    source = HOMOGENEOUS.replace("[projector]", "['*.lora_*']")

    assert emitted("megatron", source).notes[:1] == (
        "modules.vision: trainable=['*.lora_*'] is for the training script to keep, "
        "no argument says it",
    )


@pytest.mark.parametrize(
    ("change", "to", "message"),
    [
        (
            "ranks: 0-3\n    tensor_model_parallel_size: 2\n    data_parallel_size: 2",
            "ranks: 0-3\n    tensor_model_parallel_size: 1\n    data_parallel_size: 4",
            r"modules\.vision: tensor_model_parallel_size=1 must equal 2 of language for --format "
            r"megatron; use --format torchrun or slurm",
        ),
        ("ranks: 0-3", "ranks: 4-7", r"modules\.vision: ranks=4-7 must be 0-3, the first stage of"),
        ("trainable: [projector]", "recompute: full", r"vision: recompute=full must equal None of"),
        ("encoder_group: 1", "encoder_group: 4", r"schedule: encoder_group=4 must be 1 for"),
        ("ranks: 0-7", "ranks: [1, 0, 2-7]", r"language: ranks=\[1, 0, 2-7\] must be all ranks"),
    ],
)
def test_megatron_refuses_what_stock_arguments_cannot_say(change, to, message):
    with pytest.raises(PlanError, match=message):
        emitted("megatron", HOMOGENEOUS.replace(change, to))


@pytest.mark.parametrize("name", sorted(SMALL))
def test_megatron_takes_every_homogeneous_baseline_of_the_planner(name):
    baseline = make_plan(SMALL[name]).baseline
    assert baseline is not None
    sizes = baseline.candidate.language
    plan = plan_of(
        baseline.candidate,
        model=SMALL[name].model,
        num_gpus=SMALL[name].num_gpus,
        global_batch_size=SMALL[name].global_batch_size,
        layers_per_stage=baseline.layers_per_stage,
    )

    words = words_of(emitted("megatron", plan.to_yaml()).text)

    assert words[1] == f"{sizes.tp}"
    assert words[3] == f"{sizes.pp}"
