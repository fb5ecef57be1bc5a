"""Counts the bytes that a rank's recorded operations bring to it."""

from collections.abc import Iterable

from megatron_mosaic.comm.replay import P2P, Entry, Issue


def received_bytes(issue: Issue) -> float:
    """Bytes that a rank receives in an operation, if the algorithm wastes no bandwidth.

    Of an operation with a root it counts the mean over the members.

    Source:
        Thakur, Rabenseifner, Gropp, 2005, Optimization of Collective Communication Operations in
        MPICH: the bandwidth terms of the algorithms for long messages.
    """
    if issue.operation == P2P:
        return sum(part.num_bytes for part in issue.parts if part.kind == "recv")
    n = len(issue.members)
    if issue.operation in ("all_gather", "reduce_scatter"):
        return (n - 1) * issue.num_bytes  # a share comes from, or is added to, every other
    passes = 2 if issue.operation == "all_reduce" else 1
    return passes * (n - 1) / n * issue.num_bytes


def total_received_bytes(entries: Iterable[Entry], *, operation: str | None = None) -> float:
    """Bytes that a record brings to its rank, of all operations or of one kind."""
    return sum(
        received_bytes(entry)
        for entry in entries
        if isinstance(entry, Issue) and operation in (None, entry.operation)
    )
