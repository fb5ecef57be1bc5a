"""Trains under a plan on the GPU, in a rank process of its own.

Ranks share the first GPU. NCCL gives a GPU to one rank only, so several communicate through gloo,
which Megatron offers as ``--distributed-backend gloo``.
"""

import os
from contextlib import nullcontext
from typing import Any

import torch

from tests.parity.record import Record, record_plan


def record_on_gpu(
    rank: int, plan_path: str, options: list[str], on_side_stream: bool, connections: str = "1"
) -> Record:
    """Trains under a plan. Called on every rank.

    Args:
        rank: Global rank.
        plan_path: The plan.
        options: Of Megatron.
        on_side_stream: Whether everything is issued on a stream that is not the default one.
        connections: Hardware queues. Megatron insists on one for tensor parallelism before
            Blackwell; modules run at the same time with several.
    """
    _choose_the_first_gpu(connections)
    _do_without_other_packages()
    _draw_weights_on_host()
    if "gloo" in options:
        _communicate_bucket_by_bucket()
    stream = torch.cuda.Stream() if on_side_stream else torch.cuda.current_stream()
    with torch.cuda.stream(stream):
        return record_plan(rank, plan_path, options, on_cpu=False)


def _choose_the_first_gpu(connections: str) -> None:
    os.environ["LOCAL_RANK"] = "0"
    os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = connections
    # The patch embedding is a convolution, which torch would round to 10 bits.
    torch.backends.cudnn.allow_tf32 = False


def _do_without_other_packages() -> None:
    """Makes local layers and Adam work without TransformerEngine, Apex and a C compiler."""
    import torch._dynamo

    from megatron_mosaic.host.cpu import replacements

    torch._dynamo.config.disable = True
    replacements.apply(replacements.wheel_replacements())
    replacements.apply(replacements.layer_replacements())
    replacements.apply(replacements.adam_replacements())


def _draw_weights_on_host() -> None:
    """Makes initial weights those of a run on CPU: a GPU draws other numbers from a seed."""
    from megatron_mosaic.host import weights

    draw = weights._draw

    def draw_on_host(parameter: torch.nn.Parameter, *args: Any, **options: Any) -> torch.Tensor:
        host = torch.nn.Parameter(parameter.detach().cpu())
        vars(host).update(vars(parameter))  # how tensor parallelism splits it
        return draw(host, *args, **options)

    weights._draw = draw_on_host


def _communicate_bucket_by_bucket() -> None:
    """Lets Megatron reduce gradients over gloo, which coalesces tensors in host memory only."""
    from megatron.core.distributed import param_and_grad_buffer

    param_and_grad_buffer._coalescing_manager = lambda *args, **options: nullcontext()
