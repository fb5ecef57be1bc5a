"""Checks that replicas begin with equal weights where the script made them."""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist

from megatron_mosaic.errors import HostError
from megatron_mosaic.host.groups import ModuleGroups
from megatron_mosaic.host.weights import NamedParameter, is_expert, partition_of, split_of


class _Copy(NamedTuple):
    """What ranks with equal values have in common.

    ``tp`` is the place among the ranks that split a weight, -1 if none do; ``ep`` that among those
    that split the list of experts, -1 for a weight that is no expert's.
    """

    module: str
    stage: int
    tp: int
    ep: int
    weight: str


def check_replicas(
    kept: Sequence[tuple[ModuleGroups, Sequence[NamedParameter]]],
    *,
    group: dist.ProcessGroup,
) -> None:
    """Checks the weights whose values no layout-independent rule gives.

    Data-parallel ranks are replicas; so are, for Megatron, tensor-parallel ranks of a weight
    that is not marked as split. It never compares them, and checkpoints keep one of them.

    Args:
        kept: Groups of each stage on this rank, and its weights left as the script made them.
        group: Group of the world for objects of the host.

    Raises:
        HostError: Replicas differ; on every rank.

    Note:
        Collective over the world.
    """
    own = {
        _copy_of(groups, weight): _digest_of(weight.parameter)
        for groups, weights in kept
        for weight in weights
    }
    every: list[dict[_Copy, str]] = [{}] * dist.get_world_size()
    dist.all_gather_object(every, own, group=group)
    first: dict[_Copy, tuple[int, str]] = {}
    for rank, digests in enumerate(every):
        for copy, digest in digests.items():
            first_rank, first_digest = first.setdefault(copy, (rank, digest))
            if digest != first_digest:
                raise HostError(
                    f"modules.{copy.module}: initial {copy.weight} of rank {rank} must equal that "
                    f"of its replica rank {first_rank}; seed both alike in the script, or mark a "
                    f"tensor-parallel weight with set_tensor_model_parallel_attributes"
                )


def _copy_of(groups: ModuleGroups, weight: NamedParameter) -> _Copy:
    split = partition_of(weight.parameter)[0] >= 0
    return _Copy(
        module=groups.placement.name,
        stage=groups.stage,
        tp=split_of(weight.parameter, groups=groups).index if split else -1,
        ep=groups.expert_position.ep if is_expert(weight.parameter) else -1,
        weight=weight.name,
    )


def _digest_of(parameter: torch.Tensor) -> str:
    values = parameter.detach().cpu().contiguous().flatten().view(torch.uint8)
    return hashlib.sha256(values.numpy().tobytes()).hexdigest()
