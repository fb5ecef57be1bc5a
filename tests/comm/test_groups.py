import socket

from tests.ranks import run_ranks


def _nodes(rank, names):
    import torch.distributed as dist

    from megatron_mosaic.comm.groups import nodes_of_ranks

    socket.gethostname = lambda: names[rank]
    return nodes_of_ranks(dist.group.WORLD)


def test_node_of_a_rank_is_named_by_its_first_rank():
    assert run_ranks(_nodes, 3, ("b", "a", "b")) == [(0, 1, 0)] * 3
