"""Process groups and collectives: gloo where upstream names NCCL."""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist


def gloo_backed(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps ``init_process_group`` or ``new_group``: gloo, without NCCL's device and options."""

    @functools.wraps(original)
    def create(*args: Any, **kwargs: Any) -> Any:
        args = tuple("gloo" if argument == "nccl" else argument for argument in args)
        if kwargs.get("backend") is not None and "nccl" in kwargs["backend"]:
            kwargs["backend"] = "gloo"
        kwargs.pop("device_id", None)
        kwargs.pop("pg_options", None)
        return original(*args, **kwargs)

    return create


def without_device_ids(barrier: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps ``barrier``, which gloo refuses to run on a named device."""

    @functools.wraps(barrier)
    def barrier_on_cpu(*args: Any, device_ids: Any = None, **kwargs: Any) -> Any:
        return barrier(*args, **kwargs)

    return barrier_on_cpu


def split_sizes_listed(all_to_all_single: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps ``all_to_all_single``: MoE turns split sizes into lists only if they are on CUDA."""

    @functools.wraps(all_to_all_single)
    def exchange(
        output: torch.Tensor,
        input: torch.Tensor,
        output_split_sizes: Any = None,
        input_split_sizes: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        sizes = [_listed(output_split_sizes), _listed(input_split_sizes)]
        return all_to_all_single(output, input, *sizes, *args, **kwargs)

    return exchange


def uneven_gathered(all_gather: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps ``all_gather``: MoE gathers other numbers of rows from each rank, gloo equal ones."""

    @functools.wraps(all_gather)
    def gather(
        tensor_list: list[torch.Tensor],
        tensor: torch.Tensor,
        group: Any = None,
        async_op: bool = False,
    ) -> Any:
        sizes = [part.shape[0] if part.dim() else 1 for part in tensor_list]
        if len(set(sizes)) == 1:
            return all_gather(tensor_list, tensor, group=group, async_op=async_op)
        rows = torch.cat([tensor] * len(sizes))
        gathered = rows.new_empty(sum(sizes), *rows.shape[1:])
        dist.all_to_all_single(gathered, rows, sizes, [tensor.shape[0]] * len(sizes), group=group)
        for part, received in zip(tensor_list, gathered.split(sizes), strict=True):
            part.copy_(received)
        return None

    return gather


def uneven_scattered(reduce_scatter: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps ``reduce_scatter``: MoE sums other numbers of rows for each rank, gloo equal ones."""

    @functools.wraps(reduce_scatter)
    def scatter(
        output: torch.Tensor,
        input_list: list[torch.Tensor],
        op: Any = dist.ReduceOp.SUM,
        group: Any = None,
        async_op: bool = False,
    ) -> Any:
        sizes = [part.shape[0] if part.dim() else 1 for part in input_list]
        if len(set(sizes)) == 1:
            return reduce_scatter(output, input_list, op, group, async_op)
        assert op == dist.ReduceOp.SUM, "Megatron sums"
        rows = torch.cat(input_list)
        received = rows.new_empty(len(sizes) * output.shape[0], *rows.shape[1:])
        dist.all_to_all_single(received, rows, [output.shape[0]] * len(sizes), sizes, group=group)
        output.copy_(received.view(len(sizes), *output.shape).sum(dim=0))
        return None

    return scatter


def _listed(split_sizes: Any) -> Any:
    return split_sizes.tolist() if isinstance(split_sizes, torch.Tensor) else split_sizes
