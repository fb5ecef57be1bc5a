"""Makes an error of one rank an error of all.

Before any process group exists that goes through the rendezvous store, and no rank waits longer
than the time limit; later through a process group.
"""

import sys
import time
from datetime import timedelta
from typing import NoReturn

import torch
import torch.distributed as dist

from megatron_mosaic.errors import HostError

EXIT_BAD_INPUT = 2


class RankError(HostError):
    """An error that one rank found and all ranks know of.

    Args:
        message: The finder's words; another rank has none of its own.
        speaker: The rank that found it, and says it.
    """

    def __init__(self, message: str, *, speaker: int) -> None:
        super().__init__(message)
        self.speaker = speaker


class Agreement:
    """Lets all ranks go on together, or stops them all.

    Args:
        store: Store that all ranks reach.
        rank: This rank.
        world_size: Ranks that take part.
        timeout_s: Longest time to wait for a rank that does not arrive.
    """

    def __init__(
        self, store: dist.Store, *, rank: int, world_size: int, timeout_s: float = 15.0
    ) -> None:
        self._store = dist.PrefixStore("mosaic", store)
        self._rank = rank
        self._world_size = world_size
        self._timeout = timedelta(seconds=timeout_s)

    def settle(self, stage: str, error: str | None, *, digest: str = "") -> None:
        """Goes on if no rank has an error and all digests are equal.

        Args:
            stage: Name of the moment; every rank passes the same stages in the same order.
            error: This rank's error, one line; None if all is well.
            digest: What must be equal on all ranks.

        Raises:
            SystemExit: Code 2, on every rank; the first rank with an error printed it.
        """
        self._store.set(f"{stage}/{self._rank}", f"E{error}" if error else f"D{digest}")
        if self._rank == 0:
            self._store.set(f"{stage}/verdict", self._judge(stage))
        verdict = self._read(f"{stage}/verdict", patience=2)
        if verdict is None:
            stop("run: rank=0 must answer within the time limit; look at the output of rank 0")
        if verdict != "fine":
            speaker, _, message = verdict.partition(" ")
            self._leave_together(stage)
            stop(message if self._rank == int(speaker) else None)

    def _judge(self, stage: str) -> str:
        """Returns ``"fine"``, or the rank that prints and what it prints."""
        digests = {}
        for rank in range(self._world_size):
            said = self._read(f"{stage}/{rank}")
            if said is None:
                return (
                    f"0 run: rank={rank} must arrive within {self._timeout.seconds} s; "
                    f"look at the output of that rank"
                )
            if said.startswith("E"):
                return f"{rank} {said[1:]}"
            digests[rank] = said[1:]
        unlike = [rank for rank, digest in digests.items() if digest != digests[0]]
        if unlike:
            return (
                f"0 plan: digest={digests[unlike[0]][:12]} on ranks {unlike} must equal "
                f"{digests[0][:12]} of rank 0; give every rank the same plan file and "
                f"the same version of Megatron Mosaic"
            )
        return "fine"

    def _read(self, key: str, *, patience: int = 1) -> str | None:
        try:
            self._store.wait([key], self._timeout * patience)
        except (dist.DistStoreError, RuntimeError):
            return None
        return self._store.get(key).decode()

    def _leave_together(self, stage: str) -> None:
        """Keeps the rank that may serve the store alive until all have read the verdict."""
        self._store.set(f"{stage}/left/{self._rank}", "1")
        if self._rank == 0:
            for rank in range(1, self._world_size):
                self._read(f"{stage}/left/{rank}")
            time.sleep(0.1)


def raise_together(failure: HostError | None, *, group: dist.ProcessGroup) -> None:
    """Goes on if no rank has an error.

    Args:
        failure: This rank's error; None if all is well.
        group: Process group of all ranks, for tensors of the CPU.

    Raises:
        RankError: Some rank has one, on every rank; the first such rank says it.

    Note:
        Collective over the world.
    """
    world_size = dist.get_world_size()
    first = torch.tensor([dist.get_rank() if failure else world_size])
    dist.all_reduce(first, op=dist.ReduceOp.MIN, group=group)
    speaker = int(first.item())
    if speaker < world_size:
        raise RankError(str(failure or f"run: rank {speaker} stopped"), speaker=speaker)


def stop(message: str | None) -> NoReturn:
    """Ends this process because of what the user gave. Prints one line, if any.

    Raises:
        SystemExit: Code 2.
    """
    if message:
        print(f"error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(EXIT_BAD_INPUT)
