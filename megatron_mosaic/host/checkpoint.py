"""What a checkpoint of another layout needs when it is read."""

import argparse
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.training import checkpointing
from megatron.training.checkpointing import get_checkpoint_tracker_filename
from megatron.training.utils import print_rank_0
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_mosaic.errors import HostError
from megatron_mosaic.host.agreement import raise_together
from megatron_mosaic.host.checkpoint_choice import choose_checkpoint
from megatron_mosaic.host.checkpoint_files import Iteration, folder_of, is_tracked, read_index

# Sizes of the language model that Megatron keeps with a checkpoint.
_SIZES = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "num_experts",
)


def prepare_loading(args: argparse.Namespace, *, group: dist.ProcessGroup) -> None:
    """Fits the arguments to the checkpoint that is to be loaded, if there is one.

    If the latest checkpoint is damaged or incomplete, the one before is loaded. Random states are
    saved for each rank and module. Megatron decides from the language model's sizes alone whether
    they fit, and fails on a missing one if the plan differs elsewhere: so it is told not to look
    for them.

    Args:
        args: Megatron's arguments.
        group: Process group of all ranks, for objects of the CPU.

    Raises:
        RankError: No checkpoint can be used, or it is of another model.

    Note:
        Collective over the world.
    """
    # Modules whose layers the checkpoint keeps apart; None if nothing is loaded.
    args.mosaic_layers_apart = None
    args.mosaic_iteration = None
    if args.load is None or not is_tracked(Path(args.load)):
        return
    checkpoints = Path(args.load)
    iteration = choose_checkpoint(checkpoints, wanted=args.ckpt_step, group=group)
    args.mosaic_iteration = iteration
    saved = _saved_arguments(folder_of(checkpoints, iteration))
    error = None if args.finetune else _find_other_size(args, saved, iteration=iteration)
    raise_together(error, group=group)
    args.mosaic_layers_apart = getattr(saved, "mosaic_layers_apart", None) or []
    if args.no_load_rng:
        return
    if getattr(saved, "mosaic_plan_digest", None) != args.mosaic_plan_digest:
        args.no_load_rng = True
        print_rank_0("mosaic: the checkpoint is of another plan; random states start afresh")


def tracker_reader(args: argparse.Namespace) -> Callable[[str], tuple[int, bool]]:
    """Returns what reads Megatron's trackers: for that of ``--load`` it has been decided."""
    stock = checkpointing.read_metadata
    own = args.load and get_checkpoint_tracker_filename(args.load)
    iteration: Iteration | None = args.mosaic_iteration

    def read(tracker_filename: str) -> tuple[int, bool]:
        if tracker_filename != own or iteration is None:
            return stock(tracker_filename)
        return (0, True) if isinstance(iteration, str) else (iteration, False)

    return read


def check_weights(model: Any, args: argparse.Namespace, *, group: dist.ProcessGroup) -> None:
    """Checks that the checkpoint has this model's weights, before anything is loaded.

    Raises:
        RankError: One is missing or has another shape.

    Note:
        Collective over the world.
    """
    if args.mosaic_iteration is None or args.dist_ckpt_strictness != "assume_ok_unexpected":
        return
    folder = folder_of(Path(args.load), args.mosaic_iteration)
    entries = read_index(folder).state_dict_metadata
    error = None
    for value in nested_values(model.sharded_state_dict()):
        built = value.build() if isinstance(value, ShardedTensorFactory) else value
        for weight in nested_values(built) if isinstance(built, dict | list) else (built,):
            if isinstance(weight, ShardedTensor):
                error = error or _find_other_shape(weight, entries, folder=folder)
    raise_together(error, group=group)


def _find_other_shape(
    weight: ShardedTensor, entries: dict[str, Any], *, folder: Path
) -> HostError | None:
    shape, entry = tuple(weight.global_shape), entries.get(weight.key)
    if not isinstance(entry, TensorStorageMetadata):
        return HostError(
            f"checkpoint: {folder}={len(entries)} entries must include {weight.key}, as the model "
            f"has; give a checkpoint of this model"
        )
    if tuple(entry.size) != shape and not weight.allow_shape_mismatch:
        return HostError(
            f"checkpoint: {weight.key}={tuple(entry.size)} in {folder} must have shape {shape}, as "
            f"in the model; give a checkpoint of this model"
        )
    return None


def _find_other_size(
    args: argparse.Namespace, saved: argparse.Namespace | None, *, iteration: Iteration
) -> HostError | None:
    for name in _SIZES:
        own = getattr(args, name, None)
        other = getattr(saved, name, own)
        # Without grouped queries Megatron keeps one number there, and asks for none.
        if name == "num_query_groups" and not args.group_query_attention:
            continue
        if own != other:
            return HostError(
                f"checkpoint: {name}={other} in iteration {iteration} of {args.load} must equal "
                f"{own} of this run; give a checkpoint of this model, or other options"
            )
    return None


class LayerKeys:
    """Whether a checkpoint keeps the layers of a block apart, or as one stack.

    Megatron stacks them, which works if all layers train the same: it refuses to save optimizer
    states that only some layers have. What was saved says how it is to be loaded.

    Args:
        args: Megatron's arguments, after :func:`prepare_loading`; the saved ones tell a later
            run.
        uneven: Modules in which not every layer trains the same.
    """

    def __init__(self, args: argparse.Namespace, *, uneven: Collection[str]) -> None:
        self._uneven = sorted(uneven)
        self._loading: list[str] | None = args.mosaic_layers_apart
        args.mosaic_layers_apart = self._uneven

    def apart(self, module: str) -> bool:
        """Whether the next checkpoint that is read or written keeps a module's layers apart."""
        return module in (self._uneven if self._loading is None else self._loading)

    def loaded(self) -> None:
        """Notes that the checkpoint was read: those to come are this run's own."""
        self._loading = None


def _saved_arguments(folder: Path) -> argparse.Namespace | None:
    return dist_checkpointing.load_common_state_dict(str(folder)).get("args")
