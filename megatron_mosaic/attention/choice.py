"""How keys travel between context-parallel ranks: the blocks that are needed, or all of them."""

from typing import Literal

import numpy as np

from megatron_mosaic.cost.collectives import Group, all_gather_s
from megatron_mosaic.tokens.ranges import Integers

Exchange = Literal["blocks", "all_gather"]
ExchangeWish = Literal["auto", "blocks", "all_gather"]


def cheaper_exchange(
    rows: Integers, *, slots: int, row_bytes: int = 1, links: Group | None = None
) -> Exchange:
    """Chooses how the keys of a batch travel; the same on every rank.

    Without knowledge of the links fewer bytes at the busiest rank decide. With it times do: a
    block that several ranks of another node need crosses the network once for each of them,
    while an all-gather brings it there once.

    Args:
        rows: Rows that travel as blocks, ``[receiver, sender]``.
        slots: Rows of each rank's tensors, which an all-gather hands to every other.
        row_bytes: Bytes of a row.
        links: Of the context-parallel group.
    """
    cp = len(rows)
    if links is None:
        busiest = max(int(rows.sum(axis=0).max()), int(rows.sum(axis=1).max()))
        return "blocks" if busiest < (cp - 1) * slots else "all_gather"
    gather_s = all_gather_s(links, total_bytes=cp * slots * row_bytes)
    return "blocks" if blocks_s(rows * row_bytes, links) < gather_s else "all_gather"


def blocks_s(moved_bytes: Integers, links: Group) -> float:
    """Time of an all-to-all in which ranks send unlike amounts; the busiest rank decides.

    Args:
        moved_bytes: ``[receiver, sender]``.
        links: Of the ranks, the near ones of which are consecutive.
    """
    if not moved_bytes.any():
        return 0.0
    block = np.arange(len(moved_bytes)) // links.near_size
    near = block[:, None] == block[None, :]
    times = []
    for moved, tier in ((moved_bytes * near, links.near), (moved_bytes * ~near, links.far)):
        busiest = float(max(moved.sum(axis=0).max(), moved.sum(axis=1).max()))
        if busiest:
            share = tier.curve.share(busiest)
            times.append(tier.latency_s + busiest / (tier.bandwidth_bytes_per_s * share))
    return max(times)
