"""Process groups and collectives: gloo where upstream names NCCL."""

import functools
from collections.abc import Callable
from typing import Any

import torch


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


def _listed(split_sizes: Any) -> Any:
    return split_sizes.tolist() if isinstance(split_sizes, torch.Tensor) else split_sizes
