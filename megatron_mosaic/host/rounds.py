"""Tells one start of a run's ranks from another in the same rendezvous store.

When torchrun's elastic agent starts ranks again, after a failure or because nodes left or came, the
store is the one from before, with all that the former ranks wrote: an agreement that was settled,
a rank that was lost, addresses of processes that are gone. How often ranks were restarted does not
tell the starts apart, since each agent counts for itself.
"""

import json
import time
from uuid import uuid4

import torch.distributed as dist

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
        timeout_s: Longest time to wait. A rank that has not arrived by then is missed by those
            who use the store, who can say so.

    Note:
        Collective over the world.
    """
    prefixed = dist.PrefixStore("mosaic-rounds", store)
    word = uuid4().hex
    prefixed.set(f"word/{rank}", word)
    deadline_s = time.monotonic() + timeout_s
    if rank == 0:
        number = _lead(prefixed, world_size=world_size, deadline_s=deadline_s)
    else:
        number = _follow(prefixed, rank=rank, word=word, deadline_s=2 * timeout_s + deadline_s)
    return dist.PrefixStore(f"round-{number}", store)


def _lead(store: dist.Store, *, world_size: int, deadline_s: float) -> int:
    number = store.add("number", 1)
    words: dict[int, str] = {}
    while store.add(f"heard/{number}", 0) < world_size - 1 and time.monotonic() < deadline_s:
        there = [rank for rank in range(1, world_size) if store.check([f"word/{rank}"])]
        read = store.multi_get([f"word/{rank}" for rank in there]) if there else []
        found = {rank: word.decode() for rank, word in zip(there, read, strict=True)}
        if found != words:
            words = found
            store.set("round", json.dumps([number, words]))
        time.sleep(_INTERVAL_S)
    return number


def _follow(store: dist.Store, *, rank: int, word: str, deadline_s: float) -> int:
    while time.monotonic() < deadline_s:
        if store.check(["round"]):
            number, words = json.loads(store.get("round"))
            if words.get(str(rank)) == word:
                store.add(f"heard/{number}", 1)
                return number
        time.sleep(_INTERVAL_S)
    return 0  # rank 0 never says this one: whoever waits for it there finds that it is missing
