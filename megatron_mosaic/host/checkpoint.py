"""What a checkpoint of another layout needs when it is read."""

import argparse
from pathlib import Path

from megatron.core import dist_checkpointing
from megatron.training.checkpointing import get_checkpoint_tracker_filename, read_metadata
from megatron.training.utils import print_rank_0


def keep_or_drop_random_states(args: argparse.Namespace) -> None:
    """Tells Megatron not to look for random states that a checkpoint cannot have.

    Random states are saved for each rank and module. Megatron decides from the language model's
    sizes alone whether they fit, and fails on a missing one if the plan differs elsewhere.
    """
    if args.load is None or args.no_load_rng:
        return
    saved = _saved_arguments(args)
    if saved is None:
        return
    if getattr(saved, "mosaic_plan_digest", None) != args.mosaic_plan_digest:
        args.no_load_rng = True
        print_rank_0("mosaic: the checkpoint is of another plan; random states start afresh")


def _saved_arguments(args: argparse.Namespace) -> argparse.Namespace | None:
    tracker = get_checkpoint_tracker_filename(args.load)
    if not Path(tracker).is_file():
        return None
    iteration, release = read_metadata(tracker)
    name = "release" if release else f"iter_{args.ckpt_step or iteration:07d}"
    folder = Path(args.load) / name
    if not dist_checkpointing.check_is_distributed_checkpoint(str(folder)):
        return None
    return dist_checkpointing.load_common_state_dict(str(folder)).get("args")
