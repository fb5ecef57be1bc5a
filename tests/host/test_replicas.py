from types import SimpleNamespace

import pytest

from tests.ranks import RanksError, run_ranks

TP2 = {"tensor_model_parallel_size": 2}
DP2 = {"data_parallel_size": 2}
EP2 = {**DP2, "expert_model_parallel_size": 2}


def _check(
    rank: int, values: list[float], split: bool, sizes: dict[str, int], expert: bool = False
) -> None:
    import torch
    import torch.distributed as dist

    from megatron_mosaic.host.groups import ModuleGroups
    from megatron_mosaic.host.replicas import check_replicas
    from megatron_mosaic.host.weights import NamedParameter
    from megatron_mosaic.layout.placement import ModulePlacement

    placement = ModulePlacement(name="language", ranks=(0, 1), **sizes)
    groups = ModuleGroups(
        placement=placement,
        position=placement.coordinates(rank),
        expert_position=placement.expert_coordinates(rank),
        collection=SimpleNamespace(),
    )
    parameter = torch.nn.Parameter(torch.full((2, 3), values[rank]))
    if split:
        parameter.tensor_model_parallel, parameter.partition_dim = True, 0
        parameter.partition_stride = 1
    if expert:
        parameter.allreduce = False
    kept = [NamedParameter("decoder.adapter", "decoder.adapter", parameter)]
    check_replicas([(groups, kept)], group=dist.group.WORLD)


@pytest.mark.parametrize(("values", "split"), [([1.0, 1.0], False), ([1.0, 2.0], True)])
def test_equal_replicas_and_unlike_shards_pass(values, split):
    run_ranks(_check, 2, values, split, TP2)


def test_unlike_tensor_parallel_replicas_are_named():
    with pytest.raises(RanksError, match=r"decoder\.adapter of rank 1 must equal .* rank 0"):
        run_ranks(_check, 2, [1.0, 2.0], False, TP2)


def test_unlike_experts_on_expert_parallel_ranks_pass():
    run_ranks(_check, 2, [1.0, 2.0], False, EP2, True)


def test_unlike_replicas_of_an_expert_are_named():
    with pytest.raises(RanksError, match=r"decoder\.adapter of rank 1 must equal .* rank 0"):
        run_ranks(_check, 2, [1.0, 2.0], False, DP2, True)
