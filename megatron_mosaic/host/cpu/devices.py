"""CUDA devices, tensors and streams that are really the CPU."""

import functools
from collections import defaultdict
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch

FACTORIES = (
    *("arange", "as_tensor", "asarray", "empty", "empty_like", "empty_strided", "eye", "full"),
    *("full_like", "linspace", "ones", "ones_like", "rand", "rand_like", "randint"),
    *("randint_like", "randn", "randn_like", "randperm", "scalar_tensor", "tensor"),
    *("tril_indices", "triu_indices", "zeros", "zeros_like"),
)
FACTORY_METHODS = ("new_empty", "new_full", "new_ones", "new_tensor", "new_zeros")

# Blackwell: for older ones upstream demands CUDA_DEVICE_MAX_CONNECTIONS=1.
CAPABILITY = (10, 0)
PROPERTIES = SimpleNamespace(
    name="cpu",
    major=CAPABILITY[0],
    minor=CAPABILITY[1],
    total_memory=0,
    multi_processor_count=1,
)


class NullStream:
    """Stands in for a CUDA stream: the CPU runs everything in program order."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.cuda_stream = 0

    def wait_stream(self, stream: "NullStream") -> None: ...

    def wait_event(self, event: "NullEvent") -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def record_event(self, event: "NullEvent | None" = None) -> "NullEvent":
        return event or NullEvent()

    @staticmethod
    def priority_range() -> tuple[int, int]:
        return 0, 0


class NullEvent:
    """Stands in for a CUDA event: whatever it marks has happened."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def record(self, stream: NullStream | None = None) -> None: ...

    def wait(self, stream: NullStream | None = None) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, end_event: "NullEvent") -> float:
        return 0.0


def cpu_if_cuda(device: Any) -> Any:
    """Translates a CUDA device, in any of torch's spellings, to the CPU; leaves others alone.

    Args:
        device: ``torch.device``, its string, a bare index (a CUDA device, as upstream uses it),
            or ``None``.
    """
    if isinstance(device, torch.device):
        return torch.device("cpu") if device.type == "cuda" else device
    if isinstance(device, int) or (isinstance(device, str) and device.startswith("cuda")):
        return torch.device("cpu")
    return device


def device_translated(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps a factory so that ``device=`` may name CUDA and memory is not pinned."""

    @functools.wraps(original)
    def factory(*args: Any, **kwargs: Any) -> Any:
        if "device" in kwargs:
            kwargs["device"] = cpu_if_cuda(kwargs["device"])
        kwargs.pop("pin_memory", None)
        return original(*args, **kwargs)

    return factory


def first_device_translated(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps a method whose first argument or ``device=`` may be a CUDA device, as ``Tensor.to``."""

    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        if args:
            args = (cpu_if_cuda(args[0]), *args[1:])
        if "device" in kwargs:
            kwargs["device"] = cpu_if_cuda(kwargs["device"])
        return original(self, *args, **kwargs)

    return method


def map_location_translated(load: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps ``torch.load`` so that tensors saved or wanted on CUDA are loaded on CPU."""

    @functools.wraps(load)
    def load_on_cpu(f: Any, map_location: Any = None, *args: Any, **kwargs: Any) -> Any:
        wanted = "cpu" if map_location is None else cpu_if_cuda(map_location)
        return load(f, wanted, *args, **kwargs)

    return load_on_cpu


def type_name_of_cuda(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps ``Tensor.type``: upstream sorts parameters by names such as torch.cuda.FloatTensor."""

    @functools.wraps(original)
    def type_of(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        if dtype is not None:
            return original(self, dtype, *args, **kwargs)
        return original(self).replace("torch.", "torch.cuda.", 1)

    return type_of


def itself(original: Any) -> Callable[..., torch.Tensor]:
    """Makes a method that returns the tensor: the CPU is where ``.cuda()`` wants it."""
    return lambda tensor, *args, **kwargs: tensor


def answering(value: Any) -> Callable[[Any], Callable[..., Any]]:
    """Makes functions that always return ``value``.

    Each is an object of its own: torch's compiler keeps rules by identity, and torch imports it
    when the first optimizer is made.
    """

    def make(original: Any) -> Callable[..., Any]:
        return lambda *args, **kwargs: value

    return make


def null_context(original: Any) -> Callable[..., nullcontext[None]]:
    """Makes a context that selects nothing."""
    return lambda *args, **kwargs: nullcontext()


def no_memory_stats(original: Any) -> Callable[..., dict[str, int]]:
    """Makes memory statistics in which every entry is 0."""
    return lambda *args, **kwargs: defaultdict(int)


def not_compiled(original: Any) -> Callable[..., Any]:
    """Makes a ``torch.compile`` that does not, also as a decorator with arguments."""

    def compile_nothing(model: Any = None, **kwargs: Any) -> Any:
        return (lambda function: function) if model is None else model

    return compile_nothing
