"""What is said of a checkpoint before any rank starts."""

import re
import shutil
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import pytest

from megatron_mosaic.cli import main
from megatron_mosaic.layout.plan import Plan
from tests.host.test_checkpoint_faults import NUM_STEPS, PLAN_PATH, saved_steps
from tests.parity.record import OPTIMIZERS
from tests.parity.states import prepare_saving
from tests.ranks import run_ranks

PLANS = PLAN_PATH.parent


def _check(plan: Path, folder: Path):
    from megatron_mosaic.host.checkpoint_check import check_checkpoint

    return check_checkpoint(folder, Plan.load(plan))


@cache
def _saved_by_layout() -> Path:
    """Checkpoint of a stock run that keeps optimizer states as its layout has them."""
    folder = Path(mkdtemp(prefix="mosaic-checkpoints-"))
    options = ["--use-distributed-optimizer", *OPTIMIZERS["adam"], "--images", "one"]
    saving = ["--ckpt-format", "torch_dist", "--save", str(folder), "--save-interval", "1"]
    few = ["--train-iters", "1", "--eval-iters", "0"]
    run_ranks(_train_stock, 1, [*options, *saving, *few], init=False, timeout_s=120)
    return folder


def _train_stock(rank: int, options: list[str]) -> None:
    prepare_saving(None)
    from tests.parity.record import record_stock

    record_stock(rank, options)


def test_checkpoint_of_the_same_plan_is_loaded_whole():
    verdict = _check(PLAN_PATH, saved_steps())

    assert verdict.problems == ()
    assert verdict.notes[0] == f"checkpoint: iteration {NUM_STEPS} of {saved_steps()}"
    # 4 steps of 16 samples.
    assert verdict.notes[1].endswith("on 2 ranks, after 64 samples")
    assert not any("afresh" in note for note in verdict.notes)


def test_random_states_of_another_plan_start_afresh():
    verdict = _check(PLANS / "disjoint_v2_lpp2.yaml", saved_steps())

    assert verdict.problems == ()
    assert verdict.notes[-1].startswith("random states will start afresh")


def test_incomplete_checkpoint_is_passed_over(tmp_path):
    shutil.copytree(saved_steps(), tmp_path / "copy")
    (tmp_path / "copy" / "iter_0000004" / "metadata.json").unlink()

    verdict = _check(PLAN_PATH, tmp_path / "copy")

    assert verdict.notes[0].startswith("iteration 4 is passed over: metadata.json")
    assert verdict.notes[1].startswith("checkpoint: iteration 3 of ")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "vision",
            "audio",
            r"error: modules\.audio: weights=0 in iteration 4 of \S+ must be above 0; "
            r"it has modules \['language', 'vision'\]",
        ),
        (
            "tensor_model_parallel_size: 2}",
            "tensor_model_parallel_size: 2, layers_per_stage: [3]}",
            r"error: modules\.language: layers_per_stage=\[3\] must sum to num_layers=4",
        ),
        (
            "data_parallel_size: 2}",
            "data_parallel_size: 2, layers_per_stage: [1]}",
            r"error: modules\.vision: layers_per_stage=\[1\] must sum to num_layers=2",
        ),
        (
            "tensor_model_parallel_size: 2}",
            "data_parallel_size: 2, expert_model_parallel_size: 2}",
            r"error: modules\.language: expert_model_parallel_size=2 .* num_experts=None",
        ),
    ],
)
def test_plan_that_does_not_fit_is_refused(tmp_path, capsys, old, new, message):
    text = PLAN_PATH.read_text()
    assert old in text
    plan = tmp_path / "plan.yaml"
    plan.write_text(text.replace(old, new))

    assert main(["check", str(plan), "--checkpoint", str(saved_steps())]) == 2

    assert re.search(message, capsys.readouterr().err)


def test_optimizer_states_of_one_layout_are_refused(capsys):
    assert main(["check", str(PLAN_PATH), "--checkpoint", str(_saved_by_layout())]) == 2

    said = capsys.readouterr()
    assert "saved by a run without a plan on 1 ranks, after 16 samples" in said.out
    assert "distrib_optim_sharding_type=dp_reshardable in iteration 1 of" in said.err


def test_folder_without_a_checkpoint_is_refused(tmp_path, capsys):
    assert main(["check", str(PLAN_PATH), "--checkpoint", str(tmp_path)]) == 2

    assert "must hold latest_checkpointed_iteration.txt" in capsys.readouterr().err
