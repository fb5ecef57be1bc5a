"""Times messages between ranks."""

import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist

from megatron_mosaic.profile.measurements import Collective, Reach, TimedMessage
from megatron_mosaic.profile.timing import Run, Stopwatch

# Bytes of messages, by kind of device and whether time is short: from where the latency shows to
# where the bandwidth does.
MESSAGE_BYTES: Mapping[tuple[str, bool], tuple[int, ...]] = {
    ("cuda", False): tuple(2**power for power in range(12, 30, 2)),
    ("cuda", True): (2**12, 2**18, 2**24),
    ("cpu", False): tuple(2**power for power in range(12, 26, 2)),
    ("cpu", True): (2**12, 2**16, 2**20),
}
_REPEATS = 20  # on every rank alike, whatever its clock says
_VALUE_BYTES = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Peers:
    """Ranks that talk over one kind of links, this one among them.

    Args:
        reach: Which links.
        group: Their group; others may use links of the same kind at the same time, as they do in
            training.
    """

    reach: Reach
    group: dist.ProcessGroup


def make_peers(*, ranks_per_node: int) -> list[Peers]:
    """Creates the groups to be measured: within each node, and across nodes.

    Note:
        Collective over the world.
    """
    world_size, rank = dist.get_world_size(), dist.get_rank()
    near = [
        list(range(first, first + ranks_per_node)) for first in range(0, world_size, ranks_per_node)
    ]
    far = [list(range(local, world_size, ranks_per_node)) for local in range(ranks_per_node)]
    found = []
    lists: Mapping[Reach, list[list[int]]] = {"near": near, "far": far}
    for reach, groups in lists.items():
        for ranks in groups:
            if len(ranks) > 1:
                group = dist.new_group(ranks)
                if isinstance(group, dist.ProcessGroup) and rank in ranks:
                    found.append(Peers(reach=reach, group=group))
    return found


def time_messages(
    peers: Peers, sizes: tuple[int, ...], stopwatch: Stopwatch
) -> Iterator[TimedMessage]:
    """Yields the times of all collectives, each on the slowest rank of the world.

    Note:
        Collective over the world: every rank has peers of the same reach.
    """
    n = dist.get_world_size(peers.group)
    for size in sizes:
        # Every part of it is a whole number of values.
        num_values = max(1, size // (_VALUE_BYTES * n)) * n
        total = num_values * _VALUE_BYTES
        ring = total * (n - 1) / n
        known: Mapping[Collective, tuple[int, float, Callable[..., Run]]] = {
            # Steps and bytes of ring algorithms. Source: nccl-tests, doc/PERFORMANCE.md.
            "all-reduce": (2 * (n - 1), 2 * ring, _all_reduce),
            "all-gather": (n - 1, ring, _all_gather),
            "all-to-all": (1, ring, _all_to_all),
            "send": (1, total, _send_back_and_forth),
        }
        for collective, (steps, moved_bytes, prepare) in known.items():
            run = prepare(num_values, peers.group, stopwatch.device)
            seconds = _on_slowest_rank(run, stopwatch)
            if collective == "send":
                seconds /= 2  # there and back
            yield TimedMessage(peers.reach, collective, steps, moved_bytes, seconds)


def _on_slowest_rank(run: Run, stopwatch: Stopwatch) -> float:
    dist.barrier()
    own = statistics.median(stopwatch.times_s(run, repeats=_REPEATS))
    slowest = torch.tensor([own], dtype=torch.float64, device=stopwatch.device)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return slowest.item()


def _values(num_values: int, device: torch.device) -> torch.Tensor:
    return torch.zeros(num_values, dtype=torch.bfloat16, device=device)


def _all_reduce(num_values: int, group: dist.ProcessGroup, device: torch.device) -> Run:
    return partial(dist.all_reduce, _values(num_values, device), group=group)


def _all_gather(num_values: int, group: dist.ProcessGroup, device: torch.device) -> Run:
    whole = _values(num_values, device)
    own = whole.chunk(dist.get_world_size(group))[0].clone()
    # Renamed in torch 2.13, where the old name warns.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    return partial(gather, whole, own, group=group)


def _all_to_all(num_values: int, group: dist.ProcessGroup, device: torch.device) -> Run:
    out, own = _values(num_values, device), _values(num_values, device)
    return partial(dist.all_to_all_single, out, own, group=group)


def _send_back_and_forth(num_values: int, group: dist.ProcessGroup, device: torch.device) -> Run:
    """Sends from each even rank of the group to the next one, which answers."""
    message = _values(num_values, device)
    place = dist.get_rank(group)
    members = dist.get_process_group_ranks(group)
    sends_first = place % 2 == 0
    other = place + 1 if sends_first else place - 1

    def run() -> None:
        if other >= len(members):
            return  # the last of an odd number
        for send in (sends_first, not sends_first):
            kind = dist.isend if send else dist.irecv
            operation = dist.P2POp(kind, message, members[other], group=group)
            for work in dist.batch_isend_irecv([operation]):
                work.wait()

    return run
