"""Creates the process groups of a run."""

import socket
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist


class GroupFactory:
    """Creates process groups; every rank must ask for the same ones in the same order.

    Groups with equal members and scope are created once. Modules never share a group, and neither
    do the two directions of an edge: each has an order of its own, and a communicator has one.
    """

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._groups: dict[tuple[str, tuple[int, ...]], dist.ProcessGroup | None] = {}

    def group(
        self, ranks: Sequence[int], *, scope: str, backend: str | None = None
    ) -> dist.ProcessGroup | None:
        """Returns the group of ``ranks``, in that order, or None on a rank outside it.

        Args:
            ranks: Members.
            scope: What the group is for; another scope has groups of its own.
            backend: None is that of the default group.

        Note:
            Collective over the world: ranks outside a group take part in making it.
        """
        key = (scope, tuple(ranks))
        if key not in self._groups:
            # Megatron takes a rank's place in a module from its place in the group, so the order
            # of the plan's list must survive; torch would sort it.
            order: dict[str, Any] = {} if list(ranks) == sorted(ranks) else {"sort_ranks": False}
            created = dist.new_group(
                list(ranks), backend=backend, group_desc=f"mosaic.{scope}", **order
            )
            # On other ranks torch returns a placeholder.
            self._groups[key] = created if isinstance(created, dist.ProcessGroup) else None
        return self._groups[key]

    def alone(self, world_size: int, *, scope: str = "alone") -> dist.ProcessGroup:
        """Returns this rank's group of one. Collective over the world."""
        own = None
        for rank in range(world_size):
            own = self.group((rank,), scope=scope) or own
        assert own is not None
        return own

    def destroy(self) -> None:
        """Destroys the groups that were created, after a failure midway."""
        for group in self._groups.values():
            if group is not None:
                dist.destroy_process_group(group)
        self._groups.clear()


def nodes_of_ranks(group: dist.ProcessGroup) -> tuple[int, ...]:
    """Returns the node of every rank, by the first rank of the node.

    Args:
        group: Group of the world for objects of the host.

    Note:
        Collective over the world.
    """
    names = [""] * dist.get_world_size()
    dist.all_gather_object(names, socket.gethostname(), group=group)
    return tuple(names.index(name) for name in names)


def wire_of(group: dist.ProcessGroup, *, device: torch.device) -> torch.device:
    """Returns where the messages of a group lie: gloo sends and receives host memory only.

    Args:
        group: The group.
        device: Where the tensors come from and go to.
    """
    return torch.device("cpu") if dist.get_backend(group) == "gloo" else device


def warm_up(group: dist.ProcessGroup, *, device: torch.device) -> None:
    """Makes every member of a group take part in it once.

    NCCL opens a communicator with its first operation, and a batch of sends and receives that
    does not involve every member cannot be the first.

    Note:
        Collective over the group.
    """
    dist.all_reduce(torch.zeros(1, device=device), group=group)
