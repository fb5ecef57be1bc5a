"""Ranks that are started again find none of what the former ones wrote."""

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist

from megatron_mosaic.host.rounds import new_round


def _store():
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def _start(server, world_size):
    """Starts ranks as threads, each with a connection of its own."""

    def begin(rank):
        client = dist.TCPStore("127.0.0.1", server.port, timeout=timedelta(seconds=20))
        return new_round(client, rank=rank, world_size=world_size, timeout_s=10.0)

    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(begin, range(world_size)))


def test_ranks_of_one_start_share_a_part_of_the_store():
    server = _store()

    ranks = _start(server, 3)

    ranks[2].set("verdict", "fine")
    assert ranks[0].get("verdict") == ranks[1].get("verdict") == b"fine"


def test_ranks_that_are_started_again_see_nothing_of_before():
    server = _store()
    for rank in _start(server, 3):
        rank.set("lost", "rank 2")

    # With as many ranks, as after a failure, and with fewer, as after the loss of a node.
    for world_size in (3, 2):
        ranks = _start(server, world_size)

        assert not any(rank.check(["lost"]) for rank in ranks)
        ranks[0].set("mark", str(world_size))
        assert {rank.get("mark") for rank in ranks} == {str(world_size).encode()}
        ranks[1].set("lost", "rank 0")


def test_rank_0_goes_on_without_a_rank_that_does_not_arrive():
    server = _store()

    # Whoever misses the rank says so: rank 0 waits for nobody here.
    alone = new_round(server, rank=0, world_size=2, timeout_s=0.0)

    assert not alone.check(["lost"])


def test_rank_whom_rank_0_does_not_answer_says_so(capsys):
    with pytest.raises(SystemExit, match="2"):
        new_round(_store(), rank=1, world_size=2, timeout_s=0.2)

    expected = "error: run: rank=0 must answer within the time limit; look at the output of rank 0"
    assert capsys.readouterr().err == f"{expected}\n"
