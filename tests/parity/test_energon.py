"""Scripts whose data come from Megatron Energon's loaders train like one process."""

import re
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from megatron_mosaic.comm.replay import replay
from megatron_mosaic.layout.plan import Plan
from tests.parity.compare import Whole, compare, whole
from tests.parity.record import ARGUMENTS, OPTIMIZERS, record_plan, record_stock
from tests.ranks import run_ranks

pytest.importorskip("megatron.energon", reason="Megatron Energon is not installed")

PLANS = Path(__file__).parent.parent / "plans"
TIMEOUT_S = 120
SGD = OPTIMIZERS["sgd"]
# Megatron cannot load what it saved of SGD in fp32.
ADAM = OPTIMIZERS["adam"]
FROZEN = ("--freeze-ViT", "--freeze-projection", "--use-distributed-optimizer")
SAVED_STEP = 2


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    from tests.parity.energon_script import write_shards

    folder = tmp_path_factory.mktemp("digits")
    write_shards(folder, num_samples=160)
    return str(folder)


def _train(rank, plan, options, provider="loaders_provider"):
    from megatron_mosaic.host.cpu import run_on_cpu

    run_on_cpu()
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    from tests.parity import energon_script

    filesystem_async.get_write_results_queue(mp_mode="fork")
    energon_script.use(getattr(energon_script, provider))
    return record_plan(rank, plan, options)


def _train_stock(rank, options):
    from megatron_mosaic.host.cpu import run_on_cpu

    run_on_cpu()
    from tests.parity import energon_script

    energon_script.use(energon_script.replicas_provider)
    return record_stock(rank, options)


def _run(name, shards, *options, provider="loaders_provider"):
    plan = PLANS / f"{name}.yaml"
    arguments = [*SGD, "--energon-data", shards, "--dataloader-type", "external", *options]
    world_size = Plan.load(plan).world_size
    return run_ranks(
        _train, world_size, str(plan), arguments, provider, init=False, timeout_s=TIMEOUT_S
    )


@cache
def _reference(shards: str, replicas: int, *options: str) -> Whole:
    arguments = [*SGD, "--energon-data", shards, "--replicas", str(replicas), *options]
    return whole(run_ranks(_train_stock, 1, arguments, init=False, timeout_s=TIMEOUT_S))


@pytest.mark.parametrize(
    ("plan", "replicas", "provider"),
    [
        # Vision's replicas take other samples than the loaders of the language model's two.
        ("idle_rank", 2, "loaders_provider"),
        ("dp4_from_tp2", 4, "default_config_provider"),
        # Pipelines read at both ends, vision on ranks of its own.
        ("interleaved_ranks", 1, "loaders_provider"),
        ("partial_overlap_dp3", 1, "loaders_provider"),
        # Vision's replicas read both loaders, and drop each other's images.
        ("items_colocated", 2, "loaders_provider"),
    ],
)
def test_plan_trains_on_loaders_like_one_process(plan, replicas, provider, shards):
    records = _run(plan, shards, provider=provider)
    result = compare(whole(records), _reference(shards, replicas), adam=False)

    assert not result.failures, "\n".join(result.failures[:20])
    replay({rank: record.communication for rank, record in enumerate(records)})


def _relative(own: dict, other: dict) -> float:
    return max(
        float(np.linalg.norm(own[name] - other[name]) / np.linalg.norm(other[name]))
        for name in other
    )


@pytest.mark.parametrize(
    ("plan", "keeps_states", "script_options"),
    [
        ("colocated_vtp2_ldp2", True, ()),
        ("colocated_vtp2_ldp2", False, ()),
        # Two steps are read ahead.
        ("ahead_disjoint_sparse", True, FROZEN),
        # Three are, and the items are dealt as before.
        ("items_ahead_frozen", True, FROZEN),
    ],
    ids=["states", "reading_past", "states_ahead", "items_ahead"],
)
def test_resumed_run_reads_on_where_the_checkpoint_stopped(
    shards, tmp_path, plan, keeps_states, script_options
):
    folder = str(tmp_path)
    states = ["--dataloader-save", f"{folder}/data"] if keeps_states else []
    options = [*ADAM, *script_options, *states]
    through = whole(_run(plan, shards, *options, "--save", folder, "--save-interval", "2"))

    resumed = whole(_run(plan, shards, *options, "--load", folder, "--ckpt-step", str(SAVED_STEP)))

    assert len(resumed.losses) == 2
    for own, other in zip(resumed.losses, through.losses[SAVED_STEP:], strict=True):
        np.testing.assert_allclose(own["lm loss"], other["lm loss"], rtol=1e-6)
    assert _relative(resumed.weights[-1], through.weights[-1]) <= 1e-5
    saved = sorted(path.name for path in tmp_path.glob(f"data/iter_{SAVED_STEP:07d}/*/*.pt"))
    assert saved == [f"train_dataloader_dprank{dp:03d}.pt" for dp in (0, 1) if keeps_states]


def _stop(rank: int, plan: str, options: list[str]) -> tuple[int, list[str]]:
    """Runs the script in this forked rank until it exits; returns its error lines."""
    import sys

    from megatron_mosaic.host.cpu import run_on_cpu

    run_on_cpu()
    from megatron_mosaic.host.arguments import parse_and_validate_args
    from megatron_mosaic.host.training import pretrain
    from tests.parity import energon_script, vlm_script

    energon_script.use(energon_script.loaders_provider)
    written: list[str] = []
    write = sys.stderr.write
    sys.stderr.write = lambda text: written.append(text) or write(text)
    sys.argv = ["script", *ARGUMENTS, *SGD, *options, "--mosaic-plan", plan]
    try:
        vlm_script.main(parse_and_validate_args, pretrain)
    except SystemExit as stopped:
        lines = "".join(written).splitlines()
        return stopped.code, [line for line in lines if line.startswith("error: ")]
    return 0, []


def _check_stop(name: str, options: list[str], pattern: str) -> None:
    plan = PLANS / f"{name}.yaml"
    world_size = Plan.load(plan).world_size
    outcomes = run_ranks(_stop, world_size, str(plan), options, init=False, timeout_s=60)

    assert [code for code, _ in outcomes] == [2] * world_size
    lines = [line for _, own in outcomes for line in own]
    assert len(lines) == 1, lines
    assert re.search(pattern, lines[0]), lines[0]


def test_too_few_samples_stop_every_rank(shards):
    # 128 samples to train on, 16 in each of the nine steps.
    options = ["--energon-data", shards, "--one-epoch", "--train-iters", "9"]

    _check_stop("idle_rank", options, r"data: remaining samples=0 must be a whole step's")


def test_broken_shard_stops_every_rank(tmp_path):
    from tests.parity.energon_script import write_shards

    write_shards(tmp_path, num_samples=160)
    for shard in tmp_path.glob("*.tar"):
        shard.write_bytes(b"\xff" * shard.stat().st_size)

    _check_stop("idle_rank", ["--energon-data", str(tmp_path)], r"data: reading=\w+ in .* must")


def test_states_of_another_number_of_replicas_are_refused(shards, tmp_path):
    states = [*ADAM, "--dataloader-save", f"{tmp_path}/data"]
    _run("colocated_vtp2_ldp2", shards, "--save", str(tmp_path), "--save-interval", "2", *states)

    _check_stop(
        "colocated_v2_l2",
        ["--energon-data", shards, "--load", str(tmp_path), "--ckpt-step", "2", *states],
        r"dataloader_save=.* with states of 2 replicas must have one for each of the 1 replicas",
    )


def test_loader_that_was_not_restored_is_noticed(shards, tmp_path):
    states = [*ADAM, "--dataloader-save", f"{tmp_path}/data"]
    _run("colocated_vtp2_ldp2", shards, "--save", str(tmp_path), "--save-interval", "2", *states)

    # As torch.load is called in upstream's example, it refuses the loader's state.
    resume = ["--load", str(tmp_path), "--ckpt-step", "2", "--weights-only"]
    _check_stop(
        "colocated_vtp2_ldp2",
        ["--energon-data", shards, *resume, *states],
        r"data: first_step=.* must be the samples .* that followed the checkpoint",
    )
