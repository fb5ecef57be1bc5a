"""Megatron's own tests and script beside Mosaic, from a checkout of its tag."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ranks import ROOT
from tools.run_upstream_tests import COMMUNICATORS, ONE_RANK, Machine, compare

CHECKOUT = os.environ.get("MEGATRON_LM_DIR", "")

pytestmark = pytest.mark.skipif(
    not CHECKOUT, reason="MEGATRON_LM_DIR names no checkout of Megatron-LM core_v0.19.0"
)

# `make test` runs a part of what tools/run_upstream_tests.py does.
CHEAP = {
    COMMUNICATORS: (
        "test_process_groups_config",
        "test_hyper_comm_grid",
        "models/mimo/test_mimo_colocated_communicator",
    ),
    ONE_RANK: (
        "models/test_clip_vit_model",
        "models/mimo/test_mimo_submodules",
        "models/mimo/test_mimo_embedding_alignment",
        "models/mimo/test_mimo_hetero_grid_args",
        "models/mimo/test_mimo_role",
        "test_argument_utils",
    ),
}

PLAN = """format: 1
world_size: 4
global_batch_size: 16
micro_batch_size: 2
modules:
  vision: {ranks: 0-3, data_parallel_size: 4}
  language:
    ranks: 0-3
    tensor_model_parallel_size: 2
    pipeline_model_parallel_size: 2
    sequence_parallel: true
edges: [[vision, language]]
schedule: {kind: colocated, encoder_group: 4}
"""
CONTEXT_PARALLEL_PLAN = """format: 1
world_size: 4
global_batch_size: 16
micro_batch_size: 2
modules:
  vision: {ranks: 0-3, context_parallel_size: 2, pipeline_model_parallel_size: 2}
  language: {ranks: 0-3, context_parallel_size: 2, pipeline_model_parallel_size: 2}
edges: [[vision, language]]
schedule: {kind: colocated, encoder_group: 4}
"""
SIZES = """
--encoder-num-layers 2 --decoder-num-layers 4 --hidden-size 64 --num-attention-heads 4
--ffn-hidden-size 128 --seq-length 16 --max-position-embeddings 64 --img-h 28 --img-w 28
--patch-dim 14 --attention-dropout 0 --hidden-dropout 0 --vocab-size 126
--make-vocab-size-divisible-by 16
"""
RUN = """
--tokenizer-type NullTokenizer --mock-data --split 949,50,1 --train-iters 3 --lr 1e-3
--lr-decay-style constant --transformer-impl local --ckpt-format torch
--no-gradient-accumulation-fusion --num-workers 0 --eval-iters 1 --eval-interval 1000
--log-interval 1
"""


@pytest.mark.parametrize("suite", CHEAP, ids=["eight_ranks", "one_rank"])
def test_upstream_tests_pass_with_mosaic_imported(suite):
    comparison = compare(suite, CHEAP[suite], Machine(checkout=Path(CHECKOUT)))

    results = [outcome.result for outcome in comparison.without.values()]
    # 6 + 47 + 24 tests on eight ranks, 8 + 8 + 5 + 12 + 2 + 56 on one.
    assert results.count("passed") == {COMMUNICATORS: 77, ONE_RANK: 91}[suite]
    assert list(comparison.broken()) == []


@pytest.mark.parametrize(
    ("text", "text_length"),
    # With the 5 rows of an image 24 positions, which make 4 chunks of 6.
    [(PLAN, 16), (CONTEXT_PARALLEL_PLAN, 19)],
    ids=["sequence_parallel", "context_parallel"],
)
def test_upstream_script_trains_under_a_plan_as_it_is(tmp_path, text, text_length):
    # Beside a checkout's own `megatron` the installed one would be mixed with it.
    for script in Path(CHECKOUT).glob("*.py"):
        shutil.copy(script, tmp_path)
    plan = tmp_path / "plan.yaml"
    plan.write_text(text)
    command = [
        *(sys.executable, "-m", "megatron_mosaic.run", "--mosaic-device", "cpu"),
        *(str(tmp_path / "pretrain_vlm.py"), "--mosaic-plan", str(plan)),
        *(*SIZES.split(), *RUN.split(), "--dataloader-seq-length", str(text_length)),
    ]

    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        cwd=ROOT,
    )

    assert done.returncode == 0, done.stderr[-4000:]
    losses = re.findall(r"iteration +(\d)/ +3 .*lm loss: (\S+)", done.stdout)
    assert [step for step, _ in losses] == ["1", "2", "3"]
    # ln of the padded vocabulary, 128, is 4.85; the first steps barely move it.
    assert all(4.0 < float(loss) < 5.5 for _, loss in losses)
