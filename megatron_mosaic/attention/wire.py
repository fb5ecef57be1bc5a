"""In which order rows of keys and values lie in the messages between context-parallel ranks.

A message has the rows of its first sample first, and of each sample in the order of the sequence.
Messages of several ranks follow each other by rank: that is the order of the wire.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

from megatron_mosaic.attention.needed import NeededKeys
from megatron_mosaic.tokens.held import Held
from megatron_mosaic.tokens.ranges import Integers

_Among = Callable[[NeededKeys, int, int], Held]  # of a sample, the sender and the receiver


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
        cp = samples[0].assignment.cut.cp
        send = [_rows(samples, rank, peer, _own) for peer in range(cp)]
        receive = [_rows(samples, peer, rank, _received) for peer in range(cp)]
        gathered = [
            _rows(samples, peer, rank, _own) + peer * slots * len(samples) for peer in range(cp)
        ]
        return cls(
            send_counts=[len(rows) for rows in send],
            send_rows=np.concatenate(send),
            receive_counts=[len(rows) for rows in receive],
            receive_rows=np.concatenate(receive),
            gathered_rows=np.concatenate(gathered),
        )


def _own(needed: NeededKeys, sender: int, receiver: int) -> Held:
    return needed.assignment.held(sender)


def _received(needed: NeededKeys, sender: int, receiver: int) -> Held:
    return needed.received(receiver)


def _rows(samples: Sequence[NeededKeys], sender: int, receiver: int, among: _Among) -> Integers:
    """Rows that go from one rank to another, as they lie among others."""
    rows = [np.empty(0, dtype=np.int64)]
    for sample, needed in enumerate(samples) if sender != receiver else ():
        moved = needed.sent(sender, to=receiver)
        positions = moved.position(np.arange(moved.size))
        slots = among(needed, sender, receiver).place(positions)
        rows.append(slots * len(samples) + sample)
    return np.concatenate(rows)
