"""Tells one start of a run's ranks from another in the same rendezvous store.

When torchrun's elastic agent starts ranks again, after a failure or because nodes left or came, the
store is the one from before, with all that the former ranks wrote: an agreement that was settled,
a rank that was lost, addresses of processes that are gone. How often ranks were restarted does not
tell the starts apart, since each agent counts for itself.
"""

import json
import threading
import time
from contextlib import suppress
from typing import Any
from uuid import uuid4

import torch.distributed as dist

from megatron_mosaic.host.agreement import stop

_INTERVAL_S = 0.05


def new_round(store: dist.Store, *, rank: int, world_size: int, timeout_s: float) -> dist.Store:
    """Agrees with the other ranks on a part of the store in which nothing is written yet.

    Every rank writes a word that is its own. Rank 0 draws a number, and says it with the words that
    it read; a rank that finds its word beside the number is of this start. A word of a former start
    makes rank 0 say it again when the rank's new one is there.

    Args:
        store: The rendezvous store.
        rank: This rank.
        world_size: Ranks of this start.
        timeout_s: Longest time to wait for rank 0, which itself goes on at once: whoever waits
            for another rank in the store says which one is missing.

    Raises:
        SystemExit: Code 2: rank 0 says nothing.

    Note:
        Collective over the world.
    """
    prefixed: Any = dist.PrefixStore("mosaic-rounds", store)  # torch's types lack clone
    if rank != 0:
        number = _follow(prefixed, rank=rank, timeout_s=timeout_s)
    else:
        number = prefixed.add("number", 1)
        # On a connection of its own: one that waits for a key answers nobody else.
        caller = threading.Thread(
            target=_call_ranks,
            args=(prefixed.clone(), number, world_size, time.monotonic() + timeout_s),
            name="mosaic-round",
            daemon=True,
        )
        caller.start()
    return dist.PrefixStore(f"round-{number}", store)


def _call_ranks(store: dist.Store, number: int, world_size: int, deadline_s: float) -> None:
    """Says the number with the words that are there, until all ranks have heard theirs."""
    said: dict[int, str] | None = None
    with suppress(dist.DistError, RuntimeError):  # the run ends meanwhile, and the store with it
        while store.add(f"heard/{number}", 0) < world_size - 1 and time.monotonic() < deadline_s:
            there = [rank for rank in range(1, world_size) if store.check([f"word/{rank}"])]
            read = store.multi_get([f"word/{rank}" for rank in there]) if there else []
            words = {rank: word.decode() for rank, word in zip(there, read, strict=True)}
            if words != said:
                said = words
                store.set("round", json.dumps([number, words]))
            time.sleep(_INTERVAL_S)


def _follow(store: dist.Store, *, rank: int, timeout_s: float) -> int:
    word = uuid4().hex
    store.set(f"word/{rank}", word)
    deadline_s = time.monotonic() + timeout_s
    while time.monotonic() < deadline_s:
        if store.check(["round"]):
            number, words = json.loads(store.get("round"))
            if words.get(str(rank)) == word:
                store.add(f"heard/{number}", 1)
                return number
        time.sleep(_INTERVAL_S)
    stop("run: rank=0 must answer within the time limit; look at the output of rank 0")
