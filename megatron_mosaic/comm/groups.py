"""Creates the process groups that boundaries and pipelines communicate on."""

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist


def make_groups(
    members: Mapping[str, Sequence[int]], *, device: torch.device, backend: str | None = None
) -> dict[str, dist.ProcessGroup]:
    """Creates groups and opens their connections; destroys them all if one cannot be made.

    Args:
        members: Ranks of every group by its name; the same, in the same order, on every rank.
        device: Where the tensors of this rank are.
        backend: Of the groups; None is that of the default group.

    Returns:
        The groups that this rank is a member of.

    Note:
        Collective over the world: ranks outside a group take part in making it.
    """
    groups: dict[str, dist.ProcessGroup] = {}
    try:
        for name, ranks in members.items():
            group = dist.new_group(list(ranks), backend=backend, group_desc=name)
            if dist.get_rank() in ranks:
                assert isinstance(group, dist.ProcessGroup)
                groups[name] = group
                warm_up(group, device=device)
    except Exception:
        for group in groups.values():
            dist.destroy_process_group(group)
        raise
    return groups


def warm_up(group: dist.ProcessGroup, *, device: torch.device) -> None:
    """Makes every member of a group take part in it once.

    NCCL opens a communicator with its first operation, and a batch of sends and receives that
    does not involve every member cannot be the first.

    Note:
        Collective over the group.
    """
    dist.all_reduce(torch.zeros(1, device=device), group=group)
