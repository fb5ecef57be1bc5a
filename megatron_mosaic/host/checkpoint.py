"""What a checkpoint of another layout needs when it is read."""

import argparse
from collections.abc import Collection
from pathlib import Path

from megatron.core import dist_checkpointing
from megatron.training.checkpointing import get_checkpoint_tracker_filename, read_metadata
from megatron.training.utils import print_rank_0


def prepare_loading(args: argparse.Namespace) -> None:
    """Fits the arguments to the checkpoint that is to be loaded, if there is one.

    Random states are saved for each rank and module. Megatron decides from the language model's
    sizes alone whether they fit, and fails on a missing one if the plan differs elsewhere: so it
    is told not to look for them.
    """
    saved = _saved_arguments(args) if args.load is not None else None
    # Modules whose layers the checkpoint keeps apart; None if nothing is loaded.
    args.mosaic_layers_apart = None
    if saved is None:
        return
    args.mosaic_layers_apart = getattr(saved, "mosaic_layers_apart", None) or []
    if args.no_load_rng:
        return
    if getattr(saved, "mosaic_plan_digest", None) != args.mosaic_plan_digest:
        args.no_load_rng = True
        print_rank_0("mosaic: the checkpoint is of another plan; random states start afresh")


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
