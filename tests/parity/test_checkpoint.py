"""A run that resumes from a checkpoint, under the same plan or another, ends the same."""

import tempfile
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from megatron_mosaic.layout.plan import Plan
from tests.parity.compare import Whole, whole
from tests.parity.record import OPTIMIZERS, record_plan, record_stock
from tests.parity.states import differing_states, prepare_saving
from tests.parity.test_parity import PLANS
from tests.parity.training import TIMEOUT_S, script_of
from tests.ranks import run_ranks

PLAN_OF = {plan.stem: plan for plan in PLANS}
SHARDED = ("--use-distributed-optimizer",)
SEVERAL = ("--modalities", "vision", "audio", *SHARDED)
OUTPUT = ("--modalities", "vision", "generator", *SHARDED)
FROZEN = ("--freeze-ViT", "--freeze-projection")
TIED = ("--tie-embeddings", *SHARDED)
DROPOUT = ("--attention-dropout", "0.1", "--hidden-dropout", "0.1")
# Samples of one length, so that no layout pads: padding would have a part in the auxiliary loss.
EXPERTS = (
    *("--num-experts", "4", "--moe-router-topk", "2", "--moe-aux-loss-coeff", "1e-1"),
    *("--moe-token-dispatcher-type", "alltoall", "--images", "two", "--text-length", "10"),
)
# Enough layers for an uneven split over the stages of plans that have two on each rank.
DEEP = ("--encoder-num-layers", "5", "--decoder-num-layers", "5", *SHARDED)
MASKED = ("--mask", "encoder_embedded", "--text-length", "120", *SHARDED)
SAVED_STEP = 2
STOCK = ("--ckpt-format", "torch_dist", "--dist-ckpt-optim-fully-reshardable")
ASYNC = ("--async-save",)


def _train(rank: int, plan: str, options: list[str], script: str, copy: str | None):
    prepare_saving(copy)
    return record_plan(rank, plan, options, (), script)


def _train_stock(rank: int, options: list[str], script: str, copy: str | None):
    prepare_saving(copy)
    return record_stock(rank, options, script).losses


def _run(name: str, *options: str, copy: str | None = None) -> Whole:
    """Trains under a plan.

    Args:
        copy: Folder in which to save, as soon as it is loaded, what was loaded.
    """
    plan = PLAN_OF[name]
    arguments = [*OPTIMIZERS["adam"], "--images", "ragged", *options]
    world_size = Plan.load(plan).world_size
    rest = (arguments, script_of(plan), copy)
    return whole(run_ranks(_train, world_size, str(plan), *rest, init=False, timeout_s=TIMEOUT_S))


def _run_stock(world_size: int, *options: str, copy: str | None = None) -> list[dict]:
    """Trains without a plan. Returns the losses of every step."""
    arguments = [*OPTIMIZERS["adam"], "--images", "ragged", *STOCK, *options]
    rest = (arguments, "vlm_script", copy)
    return run_ranks(_train_stock, world_size, *rest, init=False, timeout_s=TIMEOUT_S)[-1]


@cache
def _saved(name: str, options: tuple[str, ...]) -> tuple[Whole, str]:
    """Trains to the end and saves on the way. Returns the run and the checkpoints' folder."""
    folder = tempfile.mkdtemp(prefix="mosaic-checkpoints-")
    return _run(name, *options, "--save", folder, "--save-interval", str(SAVED_STEP)), folder


@cache
def _saved_stock(world_size: int, options: tuple[str, ...]) -> tuple[list[dict], str]:
    """As :func:`_saved`, without a plan."""
    folder = tempfile.mkdtemp(prefix="mosaic-checkpoints-")
    saving = ("--save", folder, "--save-interval", str(SAVED_STEP))
    return _run_stock(world_size, *options, *saving), folder


def _loading(folder: str, step: int = SAVED_STEP) -> tuple[str, ...]:
    return ("--load", folder, "--ckpt-step", str(step))


def _distance(own: dict, other: dict) -> float:
    own, other = _without_copy(own, other), _without_copy(other, own)
    assert set(own) == set(other)
    return max(
        float(np.linalg.norm(own[name] - other[name]) / np.linalg.norm(other[name]))
        for name in other
    )


def _without_copy(own: dict, other: dict) -> dict:
    """Leaves out a last stage's copy of tied embeddings, which not every layout has."""
    copy = "language_model.output_layer.weight"
    return {name: weight for name, weight in own.items() if name in other or name != copy}


@pytest.mark.parametrize(
    ("saved_under", "resumed_under", "options"),
    [
        pytest.param("colocated_v2_l2", "colocated_v2_l2", SHARDED, marks=pytest.mark.slow),
        ("colocated_v2_l2", "colocated_v2_l2pp2", SHARDED),
        ("colocated_v2_l2", "partial_interleaved", SHARDED),
        ("colocated_v2_l2", "items_colocated", SHARDED),
        ("partial_interleaved", "one_rank", SHARDED),
        pytest.param("disjoint_v2_lpp2", "disjoint_v2_lpp2", SHARDED, marks=pytest.mark.slow),
        ("disjoint_v2_lpp2", "colocated_v2_l2", SHARDED),
        ("colocated_v2_l2", "disjoint_v2_lpp2", ()),
        ("idle_rank", "idle_rank", SHARDED),
        ("encoders_on_shared_ranks", "encoders_apart", SEVERAL),
        ("output_on_shared_ranks", "output_apart", OUTPUT),
        pytest.param("virtual_pp2", "virtual_pp2", SHARDED, marks=pytest.mark.slow),
        pytest.param("virtual_pp2", "one_rank", SHARDED, marks=pytest.mark.slow),
        ("colocated_v2_l2", "virtual_pp2", SHARDED),
        ("virtual_vision", "virtual_uneven_disjoint", SHARDED),
        pytest.param(
            "virtual_uneven_disjoint", "colocated_v2_l2pp2", SHARDED, marks=pytest.mark.slow
        ),
        pytest.param("virtual_uneven_vision", "one_rank", DEEP, marks=pytest.mark.slow),
        ("colocated_v2_l2", "virtual_uneven_vision", DEEP),
        ("virtual_tied_one_rank", "virtual_tied_pp2", TIED),
        pytest.param("virtual_tied_pp2", "virtual_tied_one_rank", TIED, marks=pytest.mark.slow),
        ("mask_embedded_pp2", "mask_embedded_cp2_virtual", MASKED),
    ],
)
def test_resumed_run_ends_as_the_uninterrupted_one(tmp_path, saved_under, resumed_under, options):
    through, folder = _saved(saved_under, options)

    resumed = _run(resumed_under, *options, *_loading(folder), copy=str(tmp_path))

    assert differing_states(Path(folder), tmp_path, step=SAVED_STEP) == []
    _assert_close(resumed.losses, through.losses[SAVED_STEP:])
    assert _distance(resumed.weights[-1], through.weights[-1]) <= 1e-5


def test_runs_on_eight_then_four_then_six_ranks_end_as_the_first(tmp_path):
    through, folder = _saved("eight_ranks", SHARDED)
    on_four, copies = tmp_path / "four", [tmp_path / "copy_of_8", tmp_path / "copy_of_4"]
    saving = ("--save", str(on_four), "--save-interval", "1", *ASYNC)

    second = _run("disjoint_v2_lpp2", *SHARDED, *_loading(folder), *saving, copy=str(copies[0]))
    third = _run("disjoint_vtp2_ltp2pp2", *SHARDED, *_loading(str(on_four), 3), copy=str(copies[1]))

    assert differing_states(Path(folder), copies[0], step=2) == []
    assert differing_states(on_four, copies[1], step=3) == []
    _assert_close([second.losses[0], *third.losses], through.losses[SAVED_STEP:])


@pytest.mark.parametrize("sharded", [SHARDED, ()], ids=["sharded", "whole"])
def test_master_weights_move_to_another_layout(tmp_path, sharded):
    options = ("--bf16", "--train-iters", str(SAVED_STEP), *sharded)
    _, folder = _saved("colocated_v2_l2", options)

    _run("disjoint_v2_lpp2", *options, *_loading(folder), copy=str(tmp_path))

    assert differing_states(Path(folder), tmp_path, step=SAVED_STEP) == []


# One process, or two with tensor parallelism.
STOCK_RUNS = {
    "one": (1, ()),
    "tp2": (2, ("--tensor-model-parallel-size", "2")),
}


@pytest.mark.parametrize(
    ("stock", "plan"),
    [
        ("one", "disjoint_v2_lpp2"),
        ("tp2", "partial_interleaved"),
        pytest.param("one", "virtual_pp2", marks=pytest.mark.slow),
    ],
)
def test_plan_resumes_a_stock_run(tmp_path, stock, plan):
    world_size, options = STOCK_RUNS[stock]
    losses, folder = _saved_stock(world_size, (*options, *SHARDED, *ASYNC))

    resumed = _run(plan, *SHARDED, *_loading(folder), copy=str(tmp_path))

    assert differing_states(Path(folder), tmp_path, step=SAVED_STEP) == []
    _assert_close(resumed.losses, losses[SAVED_STEP:])


@pytest.mark.parametrize(
    ("plan", "stock"),
    [
        ("disjoint_v2_lpp2", "tp2"),
        pytest.param("colocated_v2_l2", "one", marks=pytest.mark.slow),
    ],
)
def test_stock_run_resumes_a_plan(tmp_path, plan, stock):
    world_size, options = STOCK_RUNS[stock]
    through, folder = _saved(plan, SHARDED)

    # Random states are those of a layout: Megatron would look for its own.
    options = (*options, *SHARDED, *_loading(folder), "--no-load-rng")
    losses = _run_stock(world_size, *options, copy=str(tmp_path))

    assert differing_states(Path(folder), tmp_path, step=SAVED_STEP) == []
    _assert_close(losses, through.losses[SAVED_STEP:])


def _assert_close(losses: list[dict], expected: list[dict]) -> None:
    assert len(losses) == len(expected) == 2
    for own, other in zip(losses, expected, strict=True):
        np.testing.assert_allclose(own["lm loss"], other["lm loss"], rtol=1e-6)


@pytest.mark.parametrize(
    ("saved_under", "resumed_under", "options"),
    [
        pytest.param("moe_ep2_dp2", "moe_ep2_dp2", SHARDED, marks=pytest.mark.slow),
        ("moe_ep2_dp2", "moe_ep2_tp2_etp1", SHARDED),
        ("moe_ep2_tp2_etp1", "moe_ep2_pp2", SHARDED),
        pytest.param("moe_ep2_pp2", "moe_ep2_tp2_etp2", SHARDED, marks=pytest.mark.slow),
        ("moe_ep2_tp2_etp2", "moe_ep2_dp2", ()),
    ],
)
def test_experts_resume_on_other_ranks(tmp_path, saved_under, resumed_under, options):
    options = (*EXPERTS, *options)
    through, folder = _saved(saved_under, options)

    resumed = _run(resumed_under, *options, *_loading(folder), copy=str(tmp_path))

    assert differing_states(Path(folder), tmp_path, step=SAVED_STEP) == []
    assert _distance(resumed.weights[-1], through.weights[-1]) <= 1e-5


def test_frozen_modules_are_saved_and_loaded():
    frozen = (*FROZEN, *SHARDED)
    through, folder = _saved("frozen_vision", frozen)

    resumed = _run("frozen_vision", *frozen, *_loading(folder))

    assert _distance(resumed.weights[-1], through.weights[-1]) <= 1e-5


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("colocated_vtp2_ldp2", ()),
        ("virtual_uneven_vision", DEEP),
        ("virtual_uneven_vision_ahead", (*FROZEN, "--encoder-num-layers", "4", *SHARDED)),
    ],
)
def test_dropout_continues_where_a_checkpoint_stopped(name, options):
    options = (*options, *DROPOUT)
    through, folder = _saved(name, options)

    resumed = _run(name, *options, *_loading(folder))

    for name, weight in through.weights[-1].items():
        np.testing.assert_array_equal(resumed.weights[-1][name], weight, name)


@pytest.mark.parametrize(
    ("name", "options", "stages", "no_stages"),
    [
        (
            "one_layer_pp2",
            ("--train", "language_model.decoder.layers.2.*"),
            "ranks: 0-3, data_parallel_size: 2, pipeline_model_parallel_size: 2",
            "ranks: 0-1, data_parallel_size: 2",
        ),
        (
            "lora_language",
            ("--lora", "language", "--train", "*lora_*"),
            "ranks: 0-3, tensor_model_parallel_size: 2, pipeline_model_parallel_size: 2",
            "ranks: 3",
        ),
    ],
)
def test_partly_trained_model_resumes_without_its_stages(
    tmp_path, monkeypatch, name, options, stages, no_stages
):
    through, folder = _saved(name, (*options, *SHARDED))
    text = PLAN_OF[name].read_text()
    assert stages in text
    other = tmp_path / "other.yaml"
    text = text.replace(stages, no_stages)
    # No idle ranks.
    other.write_text(text if "0-3" in text else text.replace("world_size: 4", "world_size: 2"))
    monkeypatch.setitem(PLAN_OF, "other", other)

    resumed = _run("other", *options, *SHARDED, *_loading(folder))

    assert _distance(resumed.weights[-1], through.weights[-1]) <= 1e-5
