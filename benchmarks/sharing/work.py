"""Operations and bytes of a step, counted while it runs."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode


class Work(NamedTuple):
    """What a run does.

    Args:
        flops: Floating-point operations of matrix products and attention.
        num_bytes: Bytes that its kernels read and write, each tensor once for each kernel.
    """

    flops: float
    num_bytes: float


class _ByteCounter(TorchDispatchMode):
    """Adds up tensors that go into and come out of every operator that launches something."""

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view and func.namespace == "aten":
            tensors = tree_leaves((args, kwargs or {}, result))
            self.num_bytes += sum(_bytes_of(each) for each in tensors)
        return result


def _bytes_of(value: object) -> int:
    return value.numel() * value.element_size() if isinstance(value, torch.Tensor) else 0


def counted(run: Callable[[], Any]) -> Work:
    """Runs once and counts, the backward passes included.

    Bytes are those of kernels as they are launched one by one: fused ones need fewer.
    """
    with FlopCounterMode(display=False) as flops:
        run()
    with _ByteCounter() as moved:
        run()
    return Work(float(flops.get_total_flops()), float(moved.num_bytes))
