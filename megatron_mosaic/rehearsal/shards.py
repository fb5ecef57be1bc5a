"""Reads a rank's part of every weight and gradient, under the names of the whole model."""

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch


class Shard(NamedTuple):
    """A rank's part of a tensor: where it lies, and which of equal parts counts."""

    dim: int  # along which (expert) tensor parallelism splits it, or -1
    stride: int
    tp: int
    summed: bool  # whether the parts of data-parallel replicas add up
    values: np.ndarray


def hosted_shards(runtime: Any, read: Any) -> Iterator[tuple[str, Shard]]:
    for runner in runtime.runners.values():
        yield from model_shards(
            runner.model, partial(_read_of, read, runner.wrapped), runner.groups
        )


def _read_of(read: Any, wrapped: Any, model: Any, parameter: Any) -> tuple:
    """Reads from the whole module, of which a stage may have only its weights."""
    return read(wrapped, parameter)


def model_shards(
    model: torch.nn.Module, read: Any, groups: Any = None
) -> Iterator[tuple[str, Shard]]:
    from megatron.core.utils import unwrap_model

    from megatron_mosaic.host.weights import global_named_parameters, partition_of, split_of

    for name, _, parameter in global_named_parameters(unwrap_model(model)):
        values, summed = read(model, parameter)
        if values is None:
            continue
        dim, stride = partition_of(parameter)
        yield (
            name,
            Shard(
                dim=dim,
                stride=stride,
                tp=split_of(parameter, groups=groups).index if groups else 0,
                summed=summed,
                values=values.detach().float().cpu().numpy().copy(),
            ),
        )


def weight(model: torch.nn.Module, parameter: torch.Tensor) -> tuple[torch.Tensor, bool]:
    return parameter, False


def gradient(model: Any, parameter: Any) -> tuple[torch.Tensor | None, bool]:
    """Returns a gradient after its reduction; with a sharded optimizer only this rank's part."""
    if not parameter.requires_grad:
        return None, False
    if not model.ddp_config.use_distributed_optimizer:
        return parameter.main_grad, False
    for group in model.bucket_groups + model.expert_parallel_bucket_groups:
        for bucket in group.buckets:
            if parameter in bucket.param_to_index:
                return _own_part(group, bucket, parameter), True
    raise AssertionError("the parameter is in no bucket")


def _own_part(group: Any, bucket: Any, parameter: Any) -> torch.Tensor:
    size = group.intra_distributed_optimizer_instance_size
    rank = group.intra_distributed_optimizer_instance_rank
    share = bucket.grad_data.numel() // size
    start, stop = bucket.param_to_index[parameter]
    index = torch.arange(start, stop, device=parameter.device)
    own = (index >= rank * share) & (index < (rank + 1) * share)
    return parameter.main_grad * own.view_as(parameter)
