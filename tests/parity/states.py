"""Whole states of two checkpoints, bit by bit, whatever layouts wrote them."""

import argparse
import io
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint import load as load_checkpoint
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

COMMON = "common_state/shard_0_1"
# What a run puts into its own arguments is no state; these are, or limit what can be loaded.
STATE_ARGUMENTS = ("consumed_train_samples", "consumed_valid_samples", "skipped_train_samples")


def prepare_saving(copy: str | None) -> None:
    """Lets this rank save; if a folder is given, also as soon as it has loaded."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    # Megatron's own way out of starting a fresh interpreter for each rank's writer.
    filesystem_async.get_write_results_queue(mp_mode="fork")
    if copy is None:
        return
    from megatron_mosaic.host.cpu import run_on_cpu

    run_on_cpu()
    from megatron.training import get_args, training

    train = training.train

    def copy_and_train(
        step: Any, model: Any, optimizer: Any, scheduler: Any, *rest: Any, **named: Any
    ) -> Any:
        args = get_args()
        own, args.save = (args.save, args.async_save), copy
        args.async_save = False
        training.save_checkpoint_and_time(args.iteration, model, optimizer, scheduler, 0, {})
        args.save, args.async_save = own
        training.get_timers()("interval-time").stop()  # train() starts it
        return train(step, model, optimizer, scheduler, *rest, **named)

    training.train = copy_and_train


def differing_states(folder: Path, other: Path, *, step: int) -> list[str]:
    """Names what differs between the checkpoints of a step in two folders.

    Random states are left out: each rank has its own.
    """
    states, others = (dict(_states(each / f"iter_{step:07d}")) for each in (folder, other))
    assert any(name.startswith("optimizer.state.exp_avg_sq.") for name in states)
    names = sorted(states.keys() | others.keys())
    return [
        name
        for name in names
        if name not in states or name not in others or not _equal(states[name], others[name])
    ]


def _states(folder: Path) -> Iterator[tuple[str, Any]]:
    reader = FileSystemReader(folder)
    entries = reader.read_metadata().state_dict_metadata
    found: dict[str, Any] = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in entries.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    found[COMMON] = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is one process is meant
        load_checkpoint(found, storage_reader=FileSystemReader(folder), no_dist=True)
    (common,) = found.pop(COMMON)
    yield from found.items()
    yield "iteration", common["iteration"]
    yield "opt_param_scheduler", common["opt_param_scheduler"]
    yield "param_groups", _param_groups(common["optimizer"])
    for name in STATE_ARGUMENTS:
        yield name, getattr(common["args"], name)


def _param_groups(optimizer: dict) -> list[dict]:
    """Groups of all parameters in one order; each layout lists its own parameters in them."""
    parts = [optimizer[key] for key in sorted(key for key in optimizer if isinstance(key, int))]
    groups = [
        {key: value for key, value in group.items() if key != "params"}
        for part in parts or [optimizer]
        for group in part.get("optimizer", part)["param_groups"]
    ]
    return sorted(groups, key=str)


def _equal(own: Any, other: Any) -> bool:
    if isinstance(own, torch.Tensor):
        return own.dtype == other.dtype and torch.equal(own, other)
    assert not isinstance(own, argparse.Namespace)
    return own == other
