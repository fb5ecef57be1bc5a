import pytest
import torch

from tests.ranks import run_ranks


def _messages(rank, ranks_per_node):
    from megatron_mosaic.profile.links import make_peers, time_messages
    from megatron_mosaic.profile.timing import Stopwatch

    stopwatch = Stopwatch(device=torch.device("cpu"), budget_s=0.0)
    return [
        message
        for peers in make_peers(ranks_per_node=ranks_per_node)
        for message in time_messages(peers, (24,), stopwatch)
    ]


@pytest.fixture(scope="module")
def two_nodes():
    return run_ranks(_messages, 4, 2)


def test_links_inside_and_between_nodes_are_measured(two_nodes):
    kinds = ["all-reduce", "all-gather", "all-to-all", "send"]

    for messages in two_nodes:
        assert [it.reach for it in messages] == ["near"] * 4 + ["far"] * 4
        assert [it.collective for it in messages] == kinds * 2
        assert all(it.seconds > 0 for it in messages)


def test_times_are_those_of_the_slowest_rank(two_nodes):
    # A send is timed there and back, so all ranks divide the same number.
    assert two_nodes == [two_nodes[0]] * 4


def test_steps_and_bytes_are_those_of_rings():
    messages = {it.collective: it for it in run_ranks(_messages, 3, 3)[0]}

    # 24 bytes on three ranks: two of three parts pass every link, and all of them twice.
    assert messages["all-gather"][2:4] == (2, 16)
    assert messages["all-reduce"][2:4] == (4, 32)
    assert messages["all-to-all"][2:4] == (1, 16)
    assert messages["send"][2:4] == (1, 24)
