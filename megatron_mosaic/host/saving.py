"""What happens around a save, so that no failure of one costs what was saved before."""

import functools
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CONFIG_FNAME
from megatron.training.global_vars import get_args
from torch.distributed.checkpoint.api import CheckpointException

from megatron_mosaic.errors import HostError
from megatron_mosaic.host.agreement import RankError, raise_together
from megatron_mosaic.host.checkpoint_files import folder_of, tracked_iteration

_PROBE_BYTES = 16 * 2**20
_MIB = 2**20


def unmark_before_saving(save_checkpoint: Callable[..., None]) -> Callable[..., None]:
    """Wraps Megatron's function: a checkpoint that is written over is not whole any more.

    Its folder keeps the mark of a whole one otherwise, and a run that dies meanwhile leaves files
    of two runs under it.

    Args:
        save_checkpoint: Megatron's function.
    """

    @functools.wraps(save_checkpoint)
    def save(iteration: int, *arguments: Any, **options: Any) -> None:
        args = get_args()
        if dist.get_rank() == 0 and not options.get("non_persistent_ckpt"):
            (folder_of(Path(args.save), iteration) / CONFIG_FNAME).unlink(missing_ok=True)
        save_checkpoint(iteration, *arguments, **options)

    return save


@contextmanager
def explained_failures(*, group: dist.ProcessGroup) -> Iterator[None]:
    """Turns a save that failed, at once or in the background, into one line that says why.

    Args:
        group: Process group of all ranks, for tensors of the CPU.

    Raises:
        RankError: On every rank: Megatron's ranks tell each other that a write failed.
    """
    try:
        yield
    except CheckpointException as failure:
        folder = Path(get_args().save)
        # Megatron keeps the kind of an error only, so every rank asks its disk once more.
        reason = _probe(folder)
        raise_together(HostError(_explain(reason, folder=folder)) if reason else None, group=group)
        raise RankError(_explain(_first_words(failure), folder=folder), speaker=0) from failure


def _explain(reason: str, *, folder: Path) -> str:
    status = os.statvfs(folder)
    free_mib = status.f_bavail * status.f_frsize / _MIB
    return (
        f"save: folder={folder} must take a checkpoint, not fail with '{reason}' and "
        f"{free_mib:.0f} MiB free; {_kept(folder)}, make room and start again with --load"
    )


def _kept(folder: Path) -> str:
    try:
        iteration = tracked_iteration(folder)
    except FileNotFoundError:
        return "nothing was saved before"
    return f"iteration {iteration}, which was saved before, is kept"


def _probe(folder: Path) -> str | None:
    """Tries to write there. Returns why it cannot be done."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(_PROBE_BYTES))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error.strerror
    return None


def _first_words(failure: CheckpointException) -> str:
    texts = [str(error) for error, _ in failure.failures.values()]
    return " ".join((texts or ["a write failed on another rank"])[0].split())
