"""Replays what ranks issued under NCCL's rule, which gloo does not enforce.

Gloo matches operations by tag and buffers sends, so an order that would hang on GPUs passes on
CPU. Here every communicator of a rank is one queue without buffers: its head completes when every
rank that takes part has the same operation at its head. A rank that waits issues nothing.

Where modules run at the same time a rank waits less: one thread launches without waiting, and only
the lane waits. What completes here completes there as well, as long as each communicator belongs
to one lane, so that its queue is in order, and as collectives that may run at the same time are
launched in one order on all ranks. Both are checked.
"""

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations, pairwise
from typing import Literal, NamedTuple

P2P = "send/recv"  # the operation of a batch of sends and receives


class ReplayError(Exception):
    """Ranks would hang, or issued operations that do not match."""


class Part(NamedTuple):
    """One send or receive of a batch."""

    kind: Literal["send", "recv"]
    peer: int
    num_elements: int
    num_bytes: int

    def __str__(self) -> str:
        return f"{self.kind} {self.peer} ({self.num_elements})"


class Issue(NamedTuple):
    """A collective, or a batch of sends and receives, that a rank issued.

    Args:
        index: Number of the issue on its rank.
        communicator: Name of the group, equal on all its members.
        members: Global ranks of the group, in group order.
        operation: Such as ``"all_reduce"``, or ``P2P``.
        num_elements: Size on which all members must agree; None where sizes may differ.
        num_bytes: Size of this rank's tensor that ``traffic`` counts from.
        parts: Sends and receives of a batch, in order.
        lane: Lane in which the rank launched it; empty is that of the training loop.
    """

    index: int
    communicator: str
    members: tuple[int, ...]
    operation: str
    num_elements: int | None
    num_bytes: int
    parts: tuple[Part, ...] = ()
    lane: str = ""

    def __str__(self) -> str:
        if self.operation == P2P:
            return f"[{', '.join(map(str, self.parts))}] on {self.communicator}"
        size = "" if self.num_elements is None else f" ({self.num_elements})"
        return f"{self.operation}{size} on {self.communicator}"


class Wait(NamedTuple):
    """A rank does not go on until one of its issues is complete."""

    index: int


Entry = Issue | Wait


def replay(records: Mapping[int, Sequence[Entry]]) -> None:
    """Replays the records of all ranks.

    Args:
        records: By global rank, in the order of issue.

    Raises:
        ReplayError: Operations at the heads of two ranks' queues do not match, or no rank can go
            on; the error names the ranks and what each is stuck in. Or a communicator is used from
            two lanes, or two ranks launch collectives of two lanes in unlike order.
    """
    _check_lanes(records)
    ranks = [_Rank(rank, entries) for rank, entries in sorted(records.items())]
    queues = {
        name: _Communicator(name, members, ranks) for name, members in _communicators(records)
    }
    progress = True
    while progress:
        issued = [rank.advance() for rank in ranks]
        matched = [queue.match() for queue in queues.values()]
        progress = any(issued) or any(matched)
    stuck = [rank for rank in ranks if not rank.is_done()]
    if stuck:
        raise ReplayError("\n".join(["ranks would hang:", *(rank.state() for rank in stuck)]))


def _check_lanes(records: Mapping[int, Sequence[Entry]]) -> None:
    lanes: dict[int, dict[str, str]] = {}
    launches: dict[int, list[Issue]] = {}
    for rank, entries in records.items():
        inside = [entry for entry in entries if isinstance(entry, Issue) and entry.lane]
        for issue in inside:
            lane = lanes.setdefault(rank, {}).setdefault(issue.communicator, issue.lane)
            if lane != issue.lane:
                raise ReplayError(
                    f"rank {rank} uses {issue.communicator} from lanes {lane} and {issue.lane}"
                )
        awaited_at_once = {
            entry.index
            for entry, following in pairwise(entries)
            if isinstance(entry, Issue) and following == Wait(entry.index)
        }
        launches[rank] = [
            issue for issue in inside if issue.operation != P2P and issue.index in awaited_at_once
        ]
    for one, other in combinations(sorted(launches), 2):
        _check_one_order(one, launches[one], other, launches[other])


def _check_one_order(
    one: int, launched: Sequence[Issue], other: int, also_launched: Sequence[Issue]
) -> None:
    """Compares collectives that both ranks take part in, those of several lanes together.

    NCCL promises to finish collectives of several communicators only if all ranks launch them in
    one order, or the device has room for all that are launched. For those that run inside tasks
    a lane may have no room, so they have one order. Sends, receives and reductions of gradients
    are not in a lane: they run beside the tasks, with lanes or without, in the few thread blocks
    of each communicator.

    Source: NCCL user guide, "Using multiple NCCL communicators concurrently".
    """
    common = [issue for issue in launched if other in issue.members]
    theirs = [issue for issue in also_launched if one in issue.members]
    if len({issue.lane for issue in (*common, *theirs)}) < 2:
        return
    for ours, their in zip(common, theirs, strict=False):
        if ours.communicator != their.communicator:
            raise ReplayError(
                f"ranks launch in unlike order: rank {one} {ours} from lane {ours.lane}, while "
                f"rank {other} has {their} from lane {their.lane}"
            )


def _communicators(
    records: Mapping[int, Sequence[Entry]],
) -> Iterable[tuple[str, tuple[int, ...]]]:
    return {
        entry.communicator: entry.members
        for entries in records.values()
        for entry in entries
        if isinstance(entry, Issue)
    }.items()


class _Rank:
    """Where one rank is in its record, and its queues."""

    def __init__(self, rank: int, entries: Sequence[Entry]) -> None:
        self.rank = rank
        self.queues: dict[str, deque[_Queued]] = {}
        self._entries = entries
        self._position = 0
        self._complete: set[int] = set()

    def advance(self) -> bool:
        """Issues all entries up to a wait that cannot be left; says whether there were any."""
        start = self._position
        while self._position < len(self._entries):
            entry = self._entries[self._position]
            if isinstance(entry, Issue):
                queue = self.queues.setdefault(entry.communicator, deque())
                queue.append(_Queued(entry))
            elif entry.index not in self._complete:
                break
            self._position += 1
        return self._position > start

    def head(self, communicator: str) -> "_Queued | None":
        queue = self.queues.get(communicator)
        return queue[0] if queue else None

    def complete_head(self, communicator: str) -> None:
        self._complete.add(self.queues[communicator].popleft().issue.index)

    def is_done(self) -> bool:
        return self._position == len(self._entries) and not any(self.queues.values())

    def state(self) -> str:
        heads = "; ".join(str(queue[0]) for queue in self.queues.values() if queue)
        if self._position == len(self._entries):
            return f"rank {self.rank} has ended, but never completes {heads}"
        waits_for = self._entries[self._position]
        issue = next(
            entry
            for entry in self._entries
            if isinstance(entry, Issue) and entry.index == waits_for.index
        )
        return f"rank {self.rank} waits for {issue}; at its heads: {heads}"


class _Queued:
    """An issue in a queue, and the parts that have not met their counterparts."""

    def __init__(self, issue: Issue) -> None:
        self.issue = issue
        self.open = list(issue.parts)

    def take(self, kind: Literal["send", "recv"], peer: int) -> Part | None:
        """Takes the first open part of a kind from or to a peer: a pair's order is FIFO."""
        for part in self.open:
            if part.kind == kind and part.peer == peer:
                self.open.remove(part)
                return part
        return None

    def has(self, kind: Literal["send", "recv"], peer: int) -> bool:
        return any(part.kind == kind and part.peer == peer for part in self.open)

    def __str__(self) -> str:
        left = self.issue._replace(parts=tuple(self.open))
        return str(left)


class _Communicator:
    """Matches the heads of all members' queues of one communicator."""

    def __init__(self, name: str, members: Sequence[int], ranks: Sequence[_Rank]) -> None:
        self._name = name
        self._num_members = len(members)
        self._ranks = {rank.rank: rank for rank in ranks if rank.rank in members}

    def match(self) -> bool:
        """Completes what can complete now; says whether anything did."""
        matched = self._match_parts()
        return self._match_collective() or matched

    def _heads(self) -> dict[int, _Queued]:
        heads = {number: rank.head(self._name) for number, rank in self._ranks.items()}
        return {number: head for number, head in heads.items() if head is not None}

    def _match_parts(self) -> bool:
        matched = False
        heads = {rank: head for rank, head in self._heads().items() if head.issue.operation == P2P}
        for rank, head in heads.items():
            for part in list(head.open):
                peer = heads.get(part.peer)
                if part.kind == "send" and peer is not None and peer.has("recv", rank):
                    self._pair(rank, head, part.peer, peer)
                    matched = True
        for rank, head in heads.items():
            if not head.open:
                self._ranks[rank].complete_head(self._name)
        return matched

    def _pair(self, rank: int, head: _Queued, peer_rank: int, peer: _Queued) -> None:
        sent, received = head.take("send", peer_rank), peer.take("recv", rank)
        assert sent is not None
        assert received is not None
        if (sent.num_elements, sent.num_bytes) != (received.num_elements, received.num_bytes):
            raise ReplayError(
                f"rank {rank} sends {sent.num_elements} elements ({sent.num_bytes} bytes) on "
                f"{self._name}, rank {peer_rank} receives {received.num_elements} "
                f"({received.num_bytes} bytes)"
            )

    def _match_collective(self) -> bool:
        heads = self._heads()
        if len(heads) < self._num_members:
            return False
        if any(head.issue.operation == P2P for head in heads.values()):
            return False  # a batch at a head may still complete; if not, the replay is stuck
        first_rank, first = next(iter(heads.items()))
        for rank, head in heads.items():
            ours, theirs = first.issue, head.issue
            if (ours.operation, ours.num_elements) != (theirs.operation, theirs.num_elements):
                raise ReplayError(f"rank {first_rank} issued {ours}, rank {rank} issued {theirs}")
        for rank in heads:
            self._ranks[rank].complete_head(self._name)
        return True
