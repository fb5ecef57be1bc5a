"""Makes gloo cheap enough for many ranks on few cores."""

from datetime import timedelta
from typing import Any

from torch.distributed import distributed_c10d


def share_one_device() -> None:
    """Lets all gloo groups that this process creates from now on share one device.

    By itself every group has a device of its own, whose thread wakes up a hundred times a second to
    look at its sockets. A rank of a plan is in some twenty groups: the idle threads of 64 ranks
    would take more than two cores.

    Source: gloo's ``transport/tcp/loop.cc``, the timeout of ``epoll_wait``.
    """
    original: Any = distributed_c10d.ProcessGroupGloo
    device = original.create_device(hostname="127.0.0.1")

    class OnSharedDevice(original):
        def __init__(self, store: Any, rank: int, size: int, timeout: timedelta) -> None:
            options = original._Options()
            options._devices = [device]
            options._timeout = timeout
            super().__init__(store, rank, size, options)

    distributed_c10d.ProcessGroupGloo = OnSharedDevice
