import torch
import torch.distributed as dist
from torch.distributed import all_reduce as early_all_reduce

from megatron_mosaic.comm.record import record
from megatron_mosaic.comm.replay import P2P, Issue, Part, Wait, replay
from tests.ranks import run_ranks

WORLD = "default_pg#0[0, 1]"


def test_record_notes_collectives_batches_and_waits():
    records = run_ranks(_record_everything, 2)

    for rank, (entries, after) in enumerate(records):
        peer = 1 - rank
        assert _named(entries) == [
            ("all_reduce", 6, 24, WORLD),
            "wait 0",
            ("all_reduce", 6, 24, WORLD),  # through a name that was imported before
            "wait 1",
            ("all_gather", 6, 24, WORLD),
            ("reduce_scatter", 3, 12, WORLD),
            "wait 3",
            "wait 2",
            ("broadcast", 6, 24, WORLD),
            "wait 4",
            ("all_to_all", None, 24, WORLD),
            "wait 5",
            ("barrier", 0, 0, WORLD),
            "wait 6",
            ((Part("send", peer, 6, 24), Part("recv", peer, 6, 24)), WORLD),
            "wait 7",
            ("all_reduce", 12, 48, "pair#1[0, 1]"),  # two of them, coalesced
            "wait 8",
            ((Part(("send", "recv")[rank], peer, 6, 24),), WORLD),
            "wait 9",
            # Objects travel as their sizes, then as bytes of the largest.
            *_object_gather(entries, first=10),
        ]
        assert after == 0
    replay({rank: entries for rank, (entries, _) in enumerate(records)})


def _named(entries):
    names = []
    last = -1
    for entry in entries:
        if isinstance(entry, Wait):
            if names[-1] != f"wait {entry.index}":  # gloo's batch has a work for each part
                names.append(f"wait {entry.index}")
            continue
        assert entry.index == last + 1
        last = entry.index
        if entry.operation == P2P:
            names.append((entry.parts, entry.communicator))
        else:
            sizes = (entry.num_elements, entry.num_bytes)
            names.append((entry.operation, *sizes, entry.communicator))
    return names


def _object_gather(entries, *, first):
    largest = next(entry for entry in entries[::-1] if isinstance(entry, Issue)).num_bytes
    assert largest > 0
    return [
        ("all_gather", 1, 8, WORLD),
        f"wait {first}",
        ("all_gather", largest, largest, WORLD),
        f"wait {first + 1}",
    ]


def _record_everything(rank):
    tensor, other = torch.ones(6), torch.empty(6)
    pair = dist.new_group([0, 1], group_desc="pair")
    with record() as entries:
        dist.all_reduce(tensor)
        early_all_reduce(tensor)
        gathered = dist._all_gather_base(torch.empty(12), tensor, async_op=True)
        dist.reduce_scatter(torch.empty(3), list(tensor.split(3)))
        gathered.wait()
        dist.broadcast(tensor, src=0)
        splits = [2, 4] if rank else [4, 2]
        dist.all_to_all_single(other, tensor, splits, splits)
        dist.barrier()
        operations = [(dist.isend, tensor), (dist.irecv, other)]
        batch = [dist.P2POp(kind, buffer, 1 - rank) for kind, buffer in operations]
        for work in dist.batch_isend_irecv(batch):
            work.wait()
        with dist._coalescing_manager(group=pair, async_ops=True) as coalesced:
            dist.all_reduce(tensor, group=pair)
            dist.all_reduce(other, group=pair)
        coalesced.wait()
        (dist.recv if rank else dist.send)(tensor, 1 - rank)
        dist.all_gather_object([None, None], "x" * (rank + 1))
    num_entries = len(entries)
    dist.all_reduce(tensor)
    return entries, len(entries) - num_entries


def test_record_says_in_which_lane_a_rank_launches():
    (lanes, _) = run_ranks(_record_in_lanes, 2)

    assert lanes == ["", "vision", "vision", ""]


def _record_in_lanes(rank):
    lane = ""
    with record(lambda: lane) as entries:
        dist.all_reduce(torch.ones(2))
        lane = "vision"
        dist.all_reduce(torch.ones(2))
        (dist.recv if rank else dist.send)(torch.ones(2), 1 - rank)
        lane = ""
        dist.barrier()
    return [entry.lane for entry in entries if isinstance(entry, Issue)]
