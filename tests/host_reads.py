"""Notes where code reads a tensor's values on the host: on a GPU it would wait there."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode

METHODS = (
    "item",
    "tolist",
    "cpu",
    "numpy",
    "nonzero",
    "__bool__",
    "__int__",
    "__float__",
    "__index__",
)
# Their results have sizes that only the device knows, or are on the host.
OPERATIONS = {
    "aten::_local_scalar_dense",
    "aten::nonzero",
    "aten::masked_select",
    "aten::_unique2",
    "aten::unique_dim",
    "aten::equal",
    "aten::is_nonzero",
    "aten::repeat_interleave.Tensor",
}


class _Operations(TorchDispatchMode):
    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self._found = found

    def __torch_dispatch__(
        self, operation: Any, types: Any, arguments: Any = (), options: Any = None
    ) -> Any:
        name = operation.name().removesuffix(".default")
        if name in OPERATIONS or (name.startswith("aten::index") and _has_mask(arguments)):
            self._found.append(name)
        return operation(*arguments, **(options or {}))


def _has_mask(arguments: Any) -> bool:
    indices = [each for argument in arguments for each in _tensors(argument)]
    return any(index.dtype in (torch.bool, torch.uint8) for index in indices)


def _tensors(argument: Any) -> Iterator[torch.Tensor]:
    if isinstance(argument, torch.Tensor):
        yield argument
    elif isinstance(argument, (list, tuple)):
        for each in argument:
            yield from _tensors(each)


@contextmanager
def host_reads() -> Iterator[list[str]]:
    """Notes methods and operations that read values on the host, while the context is open."""
    found: list[str] = []
    with ExitStack() as stack:
        for name in METHODS:
            stack.enter_context(patch.object(torch.Tensor, name, _noting(name, found)))
        stack.enter_context(_Operations(found))
        yield found


def _noting(name: str, found: list[str]) -> Any:
    original = getattr(torch.Tensor, name)

    def noting(self: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        found.append(name)
        return original(self, *arguments, **options)

    return noting
