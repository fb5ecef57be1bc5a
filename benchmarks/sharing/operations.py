"""Single operations of the shapes that modules have, for curves and pairs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.sharing.setting import Setting
from benchmarks.sharing.work import Work, counted


@dataclass(frozen=True, kw_only=True)
class Operation:
    """One operation on tensors that are there.

    Args:
        name: For people.
        kind: The cost model's name of its kind: ``matmul.bf16``, ``elementwise``.
        run: Launches it once.
        work: What it does.
    """

    name: str
    kind: str
    run: Callable[[], Any]
    work: Work


def operations(setting: Setting) -> list[Operation]:
    """Matrix products, attention both ways and memory-bound operations."""
    sizes = _TINY if setting.tiny else _SIZES
    found = [
        *(_gemm(setting, name, *own) for name, own in sizes["gemm"].items()),
        *(
            each
            for name, own in sizes["attention"].items()
            for each in _attention(setting, name, *own)
        ),
        *(
            each
            for name, own in sizes["memory"].items()
            for each in _memory_bound(setting, name, *own)
        ),
    ]
    return [Operation(name=n, kind=k, run=run, work=counted(run)) for n, k, run in found]


# Tokens, outputs and inputs of products; items, heads, tokens, head size and causality of
# attention; tokens and hidden size of the rest: of ViT-L/14-336, Llama-3.2-1B and Llama-3-8B, from
# the files that cases.py names.
_SIZES: Mapping[str, Mapping[str, tuple[int, ...]]] = {
    "gemm": {
        "ViT-L b1 up": (576, 4096, 1024),
        "ViT-L b4 up": (2304, 4096, 1024),
        "ViT-L b16 down": (9216, 1024, 4096),
        "1B s2048 up": (2048, 16384, 2048),
        "8B s2048 up": (2048, 28672, 4096),
        "8B s8192 down": (8192, 4096, 14336),
    },
    "attention": {
        "ViT-L b4": (4, 16, 576, 64, 0),
        "1B s2048": (1, 32, 2048, 64, 1),
        "8B s8192": (1, 32, 8192, 128, 1),
    },
    "memory": {"ViT-L b16": (9216, 4096), "8B s8192": (8192, 14336)},
}
_TINY: Mapping[str, Mapping[str, tuple[int, ...]]] = {
    "gemm": {"tiny": (32, 48, 16)},
    "attention": {"tiny": (1, 2, 16, 8, 1)},
    "memory": {"tiny": (32, 64)},
}

_Made = tuple[str, str, Callable[[], Any]]


def _draw(setting: Setting, *shape: int) -> torch.Tensor:
    return torch.randn(shape, device=setting.device, dtype=setting.dtype)


def _gemm(setting: Setting, name: str, tokens: int, outputs: int, inputs: int) -> _Made:
    a, b = _draw(setting, tokens, inputs), _draw(setting, outputs, inputs)
    return f"gemm {name}", "matmul.bf16", lambda: F.linear(a, b)


def _attention(
    setting: Setting, name: str, items: int, heads: int, tokens: int, head: int, causal: int
) -> list[_Made]:
    leaves = [_draw(setting, items, heads, tokens, head).requires_grad_() for _ in range(3)]
    query, key, value = leaves
    grad = _draw(setting, items, heads, tokens, head)

    def forward() -> torch.Tensor:
        return F.scaled_dot_product_attention(query, key, value, is_causal=bool(causal))

    def both() -> Any:
        return torch.autograd.grad(forward(), leaves, grad)

    return [
        (f"attention {name} forward", "attention.forward", torch.no_grad()(forward)),
        (f"attention {name} both", "attention.both", both),
    ]


def _memory_bound(setting: Setting, name: str, tokens: int, hidden: int) -> list[_Made]:
    x, out = _draw(setting, tokens, hidden), _draw(setting, tokens, hidden)
    weight = _draw(setting, hidden)
    return [
        (f"norm {name}", "elementwise", lambda: F.layer_norm(x, (hidden,), weight)),
        (f"gelu {name}", "elementwise", lambda: F.gelu(x)),
        (f"copy {name}", "elementwise", lambda: out.copy_(x)),
    ]
