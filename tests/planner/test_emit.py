"""Plans as other programs take them: literal text, and what each format refuses."""

import json
import os
import shlex
import subprocess
import sys

import pytest

from megatron_mosaic.cli import main
from megatron_mosaic.errors import PlanError
from megatron_mosaic.layout.plan import Plan
from megatron_mosaic.planner.candidate import plan_of
from megatron_mosaic.planner.emit.emission import Launch
from megatron_mosaic.planner.emit.formats import FORMATS, emit
from megatron_mosaic.planner.planner import make_plan
from tests.planner.test_plans import SMALL

LANGUAGE = """\
format: 1
world_size: 8
global_batch_size: 64
micro_batch_size: 2
modules:
  language:
    ranks: 0-7
    tensor_model_parallel_size: 2
    pipeline_model_parallel_size: 2
    data_parallel_size: 2
    sequence_parallel: true
    recompute: full
schedule: {kind: 1f1b}
"""

HOMOGENEOUS = """\
format: 1
world_size: 8
global_batch_size: 64
micro_batch_size: 2
modules:
  language:
    ranks: 0-7
    tensor_model_parallel_size: 2
    pipeline_model_parallel_size: 2
    data_parallel_size: 2
    layers_per_stage: [14, 18]
  vision:
    ranks: 0-3
    tensor_model_parallel_size: 2
    data_parallel_size: 2
    trainable: [projector]
edges: [[vision, language]]
schedule: {kind: colocated, encoder_group: 1}
"""

DISJOINT = """\
format: 1
world_size: 16
global_batch_size: 64
micro_batch_size: 2
modules:
  vision: {ranks: 0-3, tensor_model_parallel_size: 2, data_parallel_size: 2}
  language:
    ranks: 4-15
    tensor_model_parallel_size: 2
    pipeline_model_parallel_size: 3
    data_parallel_size: 2
edges: [[vision, language]]
schedule: {kind: 1f1b}
"""


def emitted(form, source, *, gpus_per_node=8):
    launch = Launch(plan_path="plan.yaml", script="pretrain_vlm.py", gpus_per_node=gpus_per_node)
    return emit(Plan.loads(source, where="plan.yaml"), form=form, launch=launch)


def words_of(text):
    return shlex.split(text.replace("\\\n", " "))


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


@pytest.mark.parametrize(
    ("form", "field"), [("mimo", "    sequence_parallel: true\n"), ("bridge", "")]
)
def test_forms_without_virtual_stages_refuse_them(form, field):
    # 12 microbatches of 2 samples on 2 replicas fill a pipeline of 3 ranks.
    source = interleaved(DISJOINT, field).replace("batch_size: 64", "batch_size: 48")

    with pytest.raises(PlanError, match="virtual_pipeline_model_parallel_size=2 must be 1"):
        emitted(form, source)


@pytest.mark.parametrize("form", ["megatron", "mimo"])
def test_other_programs_fill_no_bubbles(form):
    source = HOMOGENEOUS if form == "megatron" else DISJOINT
    source = source.replace("{kind: colocated, encoder_group: 1}", "{kind: bubble_fill}")

    with pytest.raises(PlanError, match="kind=bubble_fill must be colocated"):
        emitted(form, source.replace("{kind: 1f1b}", "{kind: bubble_fill}"))


def interleaved(source, layers=""):
    virtual = f"    virtual_pipeline_model_parallel_size: 2\n{layers}"
    language, _, rest = source.partition("schedule:")
    edges = ""
    if "edges:" in language:
        language, _, edges = language.partition("edges:")
        edges = f"edges:{edges}"
    return f"{language}{virtual}{edges}schedule:{rest}".replace("1f1b", "interleaved")


def split_into(layers):
    source = LANGUAGE.replace("pipeline_model_parallel_size: 2", "pipeline_model_parallel_size: 4")
    return source.replace("data_parallel_size: 2", f"layers_per_stage: {layers}")


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


def test_refusal_names_the_formats_that_can():
    with pytest.raises(
        PlanError,
        match=r"^plan\.yaml: modules\.language: ranks=4-15 must be all ranks .* for --format "
        r"megatron; use --format bridge or torchrun or slurm$",
    ):
        emitted("megatron", DISJOINT)


def test_refusal_of_all_formats_names_the_nodes():
    with pytest.raises(PlanError, match=r"gpus_per_node=7.*; give --gpus-per-node a divisor of 8 "):
        emitted(
            "slurm", HOMOGENEOUS.replace("encoder_group: 1", "encoder_group: 2"), gpus_per_node=7
        )


SEQUENCE_PARALLEL = DISJOINT.replace(
    "pipeline_model_parallel_size: 3",
    "pipeline_model_parallel_size: 3\n    sequence_parallel: true",
)


def test_mimo_takes_an_encoder_before_the_language_model():
    assert emitted("mimo", SEQUENCE_PARALLEL).text == (
        "--encoder-tp 2 \\\n"
        "  --encoder-dp 2 \\\n"
        "  --llm-offset 4 \\\n"
        "  --llm-tp 2 \\\n"
        "  --llm-pp 3 \\\n"
        "  --llm-dp 2 \\\n"
        "  --micro-batch-size 2 \\\n"
        "  --global-batch-size 64 \\\n"
        "  --use-distributed-optimizer \\\n"
        "  --calculate-per-token-loss"
    )


def test_mimo_takes_a_language_model_alone():
    emission = emitted("mimo", LANGUAGE)

    words = " ".join(words_of(emission.text))
    assert words.startswith("--llm-only --llm-offset 0 --llm-tp 2 --llm-pp 2 --llm-dp 2 ")
    assert "--recompute-granularity full --recompute-method uniform" in words


def test_mimo_takes_a_language_model_of_one_stage_without_pipelining():
    source = LANGUAGE.replace("pipeline_model_parallel_size: 2", "context_parallel_size: 1")
    source = source.replace("data_parallel_size: 2", "data_parallel_size: 4")

    assert "--llm-dp 4" in emitted("mimo", source.replace("1f1b", "no_pipelining")).text


@pytest.mark.parametrize(
    ("change", "to", "message"),
    [
        ("sequence_parallel: true", "sequence_parallel: false", r"sequence_parallel=false must be"),
        (
            "ranks: 4-15",
            "ranks: [5, 4, 6-15]",
            r"language: ranks=\[5, 4, 6-15\] must be 4-15, the n",
        ),
        (
            "tensor_model_parallel_size: 2, data_parallel_size: 2",
            "context_parallel_size: 2, data_parallel_size: 2",
            r"modules\.vision: context_parallel_size=2 must be 1 for --format mimo",
        ),
        (
            "tensor_model_parallel_size: 2, data_parallel_size: 2",
            "pipeline_model_parallel_size: 2, data_parallel_size: 2",
            r"modules\.vision: pipeline_model_parallel_size=2 must be 1",
        ),
        (
            "pipeline_model_parallel_size: 3",
            "pipeline_model_parallel_size: 3\n    layers_per_stage: [9, 12, 11]",
            r"modules\.language: layers_per_stage=\[9, 12, 11\] must be an even split",
        ),
        ("schedule: {kind: 1f1b}", "schedule: {kind: colocated}", r"encoder_group=16 must be 1"),
        ("world_size: 16", "world_size: 18", r"world_size=18 must be 16, the ranks that host"),
    ],
)
def test_mimo_refuses_what_its_example_cannot_run(change, to, message):
    with pytest.raises(PlanError, match=message):
        emitted("mimo", SEQUENCE_PARALLEL.replace(change, to))


def test_bridge_takes_modules_side_by_side():
    text = emitted("bridge", DISJOINT).text

    assert (
        text
        == """\
from megatron.bridge.models.megatron_mimo import (
    MegatronMIMOParallelismConfig,
    ModuleParallelismConfig,
)

parallelism = MegatronMIMOParallelismConfig(
    module_parallelisms={
        "language": ModuleParallelismConfig(
            tensor_model_parallel_size=2,
            data_parallel_size=2,
            pipeline_model_parallel_size=3,
            rank_offset=4,
        ),
        "vision": ModuleParallelismConfig(
            tensor_model_parallel_size=2,
            data_parallel_size=2,
            rank_offset=0,
        ),
    },
)
cfg.train.micro_batch_size = 4  # of all replicas
cfg.train.global_batch_size = 64"""
    )
    compile(text, "config.py", "exec")


def test_bridge_takes_experts_and_several_encoders():
    source = DISJOINT.replace("world_size: 16", "world_size: 18").replace(
        "[vision, language]]", "[vision, language], [audio, language]]"
    )
    source = source.replace(
        "edges:", "  audio: {ranks: 16-17, data_parallel_size: 2, trainable: []}\nedges:"
    ).replace("stage", "stage")
    source = source.replace(
        "pipeline_model_parallel_size: 3",
        "pipeline_model_parallel_size: 3\n    expert_model_parallel_size: 4\n"
        "    expert_tensor_parallel_size: 1",
    )

    emission = emitted("bridge", source)

    assert (
        """\
            pipeline_model_parallel_size=3,
            expert_model_parallel_size=4,
            expert_tensor_parallel_size=1,
            rank_offset=4,
"""
        in emission.text
    )
    assert (
        """\
        "audio": ModuleParallelismConfig(
            data_parallel_size=2,
            rank_offset=16,
        ),
"""
        in emission.text
    )
    assert emission.notes == (
        "modules.audio: trainable=[] is for the provider's freeze_* fields to keep",
    )


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (LANGUAGE, r"modules: names=\['language'\] must have an encoder beside language"),
        (HOMOGENEOUS, r"modules\.vision: ranks=0-3 must be 8-11, the next ones that no other"),
        (SEQUENCE_PARALLEL, r"modules\.language: sequence_parallel=true must be false for"),
        (
            DISJOINT.replace(
                "tensor_model_parallel_size: 2, data", "context_parallel_size: 2, data"
            ),
            r"modules\.vision: context_parallel_size=2 must be 1",
        ),
        (
            DISJOINT.replace(
                "tensor_model_parallel_size: 2, data_parallel_size: 2", "data_parallel_size: 4"
            ).replace("micro_batch_size: 2", "micro_batch_size: 1"),
            r"modules\.vision: data_parallel_size=4 must divide the 2 samples of a microbatch",
        ),
    ],
)
def test_bridge_refuses_what_its_configuration_cannot_say(source, message):
    with pytest.raises(PlanError, match=message):
        emitted("bridge", source)


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


@pytest.mark.parametrize("form", FORMATS)
def test_args_command_prints_every_format(form, tmp_path, capsys):
    path = tmp_path / "plan.yaml"
    path.write_text(HOMOGENEOUS)

    status = main(["args", str(path), "--format", form])

    captured = capsys.readouterr()
    if form in ("mimo", "bridge"):
        assert status == 2
        assert len(captured.err.splitlines()) == 1
        assert captured.err.startswith(f"error: {path}: modules.vision: ranks=0-3 must be 8-11")
    else:
        assert status == 0
        assert captured.out.count("\n") > 3


def test_args_command_refuses_nodes_without_gpus(capsys):
    status = main(["args", "plan.yaml", "--format", "slurm", "--gpus-per-node", "0"])

    assert status == 2
    assert "--gpus-per-node=0 must be >= 1" in capsys.readouterr().err


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
