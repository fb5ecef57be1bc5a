"""Which checkpoint all ranks load: the latest one that is whole."""

from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.training.utils import print_rank_0

from megatron_mosaic.host.agreement import RankError
from megatron_mosaic.host.checkpoint_files import (
    Item,
    Iteration,
    find_damaged_item,
    find_short_file,
    folder_of,
    items_of,
    iterations_to_try,
    read_index,
)


def choose_checkpoint(
    checkpoints: Path, *, wanted: int | None, group: dist.ProcessGroup
) -> Iteration:
    """Finds the checkpoint to load; each rank reads its share of the files for it.

    Args:
        checkpoints: Folder that Megatron saved into.
        wanted: Iteration that the user asked for; no other will do.
        group: Process group of all ranks, for objects of the CPU.

    Returns:
        The iteration, alike on all ranks.

    Raises:
        RankError: There is no whole checkpoint, or the one asked for is not.

    Note:
        Collective over the world.
    """
    candidates = _from_rank_0([wanted] if wanted else _listed(checkpoints), group=group)
    reasons = []
    for iteration in candidates:
        reason = _find_fault(folder_of(checkpoints, iteration), group=group)
        if reason is None:
            if reasons:
                print_rank_0(
                    f"warning: checkpoint: {'; '.join(reasons)}; iteration {iteration} is loaded"
                )
            return iteration
        reasons.append(f"iteration={iteration} in {checkpoints} must be whole, but {reason}")
    shown = "; ".join(reasons) or f"load={checkpoints} must hold a checkpoint, but has none"
    advice = "give another --ckpt-step" if wanted else "give another folder, or start without"
    raise RankError(f"checkpoint: {shown}; {advice}", speaker=0)


def _listed(checkpoints: Path) -> list[Iteration]:
    if dist.get_rank():
        return []
    try:
        return iterations_to_try(checkpoints)
    except OSError:
        return []


def _find_fault(folder: Path, *, group: dist.ProcessGroup) -> str | None:
    """Says, on all ranks alike, what is wrong with a checkpoint."""
    seen = _look_at(folder) if dist.get_rank() == 0 else None
    reason, items = _from_rank_0(seen, group=group)
    if reason is not None:
        return reason
    share = items[dist.get_rank() :: dist.get_world_size()]
    found: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(found, find_damaged_item(folder, share), group=group)
    return next((each for each in found if each is not None), None)


def _look_at(folder: Path) -> tuple[str | None, list[Item]]:
    try:
        items = items_of(read_index(folder))
    except ValueError as error:
        return str(error), []
    return find_short_file(folder, items), items


def _from_rank_0(value: object, *, group: dist.ProcessGroup) -> Any:
    box = [value]
    dist.broadcast_object_list(box, src=0, group=group)
    return box[0]
