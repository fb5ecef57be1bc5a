"""In which order rows of keys and values lie in the messages between context-parallel ranks.

A message has the rows of its first sample first, and of each sample in the order of the sequence.
Messages of several ranks follow each other by rank: that is the order of the wire.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

from megatron_mosaic.attention.needed import NeededKeys
from megatron_mosaic.tokens.held import Held
from megatron_mosaic.tokens.ranges import Integers, counted_from


@dataclass(frozen=True, kw_only=True, eq=False)
class WireRows:
    """What one rank sends and receives for a batch.

    A tensor ``[slots, b, ...]`` has ``slots * b`` rows, row ``slot * b + sample`` for a token.

    Args:
        send_counts: Rows for each rank.
        send_rows: Where they lie among the rank's own, in the order of the wire.
        receive_counts: Rows from each rank.
        receive_rows: Where they go among those received ``[received slots, b]``, in that order.
        gathered_rows: Where the same rows lie in the tensors of all ranks one after the other.
    """

    send_counts: list[int]
    send_rows: Integers
    receive_counts: list[int]
    receive_rows: Integers
    gathered_rows: Integers

    @classmethod
    def of(cls, samples: Sequence[NeededKeys], *, rank: int, slots: int) -> Self:
        """Derives them for a batch, whose samples have the same ranks."""
        cp, b = samples[0].assignment.cut.cp, len(samples)
        send, receive, gathered = ([[] for _ in range(cp)] for _ in range(3))
        for sample, needed in enumerate(samples):
            own, received = needed.assignment.held(rank), needed.received(rank)
            for peer in range(cp):
                if peer == rank:
                    continue
                outgoing = needed.sent(rank, to=peer)
                send[peer].append(_places(outgoing, own) * b + sample)
                incoming = needed.sent(peer, to=rank)
                receive[peer].append(_places(incoming, received) * b + sample)
                theirs = _places(incoming, needed.assignment.held(peer))
                gathered[peer].append((peer * slots + theirs) * b + sample)
        return cls(
            send_counts=[sum(map(len, rows)) for rows in send],
            send_rows=_joined(send),
            receive_counts=[sum(map(len, rows)) for rows in receive],
            receive_rows=_joined(receive),
            gathered_rows=_joined(gathered),
        )


def _places(moved: Held, among: Held) -> Integers:
    """Where tokens are among others: those that follow each other do so there too."""
    first = among.place(moved.start)
    return counted_from(first, moved.stop - moved.start, first)[1]


def _joined(rows_of_peers: Sequence[Sequence[Integers]]) -> Integers:
    rows = [rows for peer in rows_of_peers for rows in peer]
    return np.concatenate([np.empty(0, dtype=np.int64), *rows])
