"""Operations whose efficiency the cost model asks for, at several sizes."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F

from megatron_mosaic.profile.timing import Run

# FLOPs of a flash attention's backward pass over its forward's: five multiplications for two.
# Source: Dao, arXiv 2307.08691, section 3.1.
FLASH_BACKWARD = 2.5

DTYPES: Mapping[str, torch.dtype] = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp8": torch.float8_e4m3fn,
}


class Operation(NamedTuple):
    """Something to be timed.

    Args:
        curve: Name of its efficiency curve.
        size: FLOPs, or bytes moved where memory bounds it.
        prepare: Makes its tensors and returns what is timed.
    """

    curve: str
    size: float
    prepare: Callable[[], Run]


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """How large the operations are.

    Args:
        matmul: Rows, columns and inner size of square multiplications.
        sequence: Lengths of a sequence, for attention.
        values: Values of a tensor, for what memory bounds.
        heads: Heads of attention, of 128 values each.
    """

    matmul: tuple[int, ...]
    sequence: tuple[int, ...]
    values: tuple[int, ...]
    heads: int


_HEAD_SIZE = 128

# A device's largest sizes come close to its limits; the smallest ones show what every operation
# costs. A CPU reaches its limits sooner, and takes longer.
SIZES: Mapping[tuple[str, bool], Sizes] = {
    ("cuda", False): Sizes(
        matmul=(256, 512, 1024, 2048, 4096, 8192),
        sequence=(512, 1024, 2048, 4096, 8192),
        values=(2**16, 2**20, 2**23, 2**25, 2**27),
        heads=16,
    ),
    ("cuda", True): Sizes(
        matmul=(512, 2048, 4096),
        sequence=(1024, 2048, 4096),
        values=(2**16, 2**20, 2**23, 2**25),
        heads=16,
    ),
    ("cpu", False): Sizes(
        matmul=(64, 128, 256, 512, 1024, 2048),
        sequence=(128, 256, 512, 1024),
        values=(2**12, 2**16, 2**20, 2**23, 2**25),
        heads=4,
    ),
    ("cpu", True): Sizes(
        matmul=(64, 128, 256),
        sequence=(64, 128, 256),
        values=(2**12, 2**16, 2**18, 2**20),
        heads=2,
    ),
}


def precisions_of(device: torch.device) -> tuple[str, ...]:
    """Precisions in which a device is measured: those in which it trains."""
    if device.type == "cpu":
        return ("fp32", "bf16")
    # Tensor cores know fp8 since Ada and Hopper.
    # Source: CUDA C++ Programming Guide, table of supported data types by compute capability.
    has_fp8 = torch.cuda.get_device_capability(device) >= (8, 9)
    return ("bf16", "fp16", "fp8") if has_fp8 else ("bf16", "fp16")


def operations(device: torch.device, sizes: Sizes) -> Iterator[Operation]:
    """Yields all operations, the sizes of one after the other."""
    for precision in precisions_of(device):
        for size in sizes.matmul:
            yield Operation(
                f"matmul.{precision}",
                2 * size**3,
                partial(_matmul, size, precision, device),
            )
        if precision != "fp8":
            yield from _attentions(sizes, precision, device)
    for values in sizes.values:
        # Adding reads two tensors of 2 bytes a value and writes one.
        yield Operation("elementwise", 6 * values, partial(_add, values, device))
    for values in sizes.values[:-1]:  # each takes eight times the memory of the addition
        # Adam reads weight, gradient and both moments in fp32, and writes all but the gradient.
        yield Operation("optimizer", 28 * values, partial(_adam, values, device))


def num_operations(device: torch.device, sizes: Sizes) -> int:
    """Operations that ``operations`` yields."""
    return sum(1 for _ in operations(device, sizes))


def _attentions(sizes: Sizes, precision: str, device: torch.device) -> Iterator[Operation]:
    for length in sizes.sequence:
        # Scores and weighted values, 2 FLOPs each for every pair that a causal mask shows.
        pairs = length * (length + 1) / 2
        flops = 4 * pairs * sizes.heads * _HEAD_SIZE
        shape = (1, sizes.heads, length, _HEAD_SIZE)
        yield Operation(
            f"attention.forward.{precision}",
            flops,
            partial(_attention_forward, shape, precision, device),
        )
        yield Operation(
            f"attention.backward.{precision}",
            FLASH_BACKWARD * flops,
            partial(_attention_backward, shape, precision, device),
        )


def _matmul(size: int, precision: str, device: torch.device) -> Run:
    left, right = (torch.randn(size, size, device=device).to(DTYPES[precision]) for _ in range(2))
    if precision == "fp8":
        scale = torch.ones((), device=device)
        return partial(
            torch._scaled_mm,
            left,
            right.t(),  # the second operand lies column by column
            scale_a=scale,
            scale_b=scale,
            out_dtype=torch.bfloat16,
        )
    out = torch.empty_like(left)
    return partial(torch.mm, left, right, out=out)


def _attention_inputs(
    shape: Sequence[int], precision: str, device: torch.device, *, gradient: bool
) -> list[torch.Tensor]:
    return [
        torch.randn(*shape, device=device).to(DTYPES[precision]).requires_grad_(gradient)
        for _ in range(3)
    ]


def _attention_forward(shape: Sequence[int], precision: str, device: torch.device) -> Run:
    query, key, value = _attention_inputs(shape, precision, device, gradient=False)
    return partial(F.scaled_dot_product_attention, query, key, value, is_causal=True)


def _attention_backward(shape: Sequence[int], precision: str, device: torch.device) -> Run:
    inputs = _attention_inputs(shape, precision, device, gradient=True)
    query, key, value = inputs
    output = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    return partial(torch.autograd.grad, output, inputs, torch.randn_like(output), retain_graph=True)


def _add(values: int, device: torch.device) -> Run:
    left, right = (torch.randn(values, device=device).bfloat16() for _ in range(2))
    return partial(torch.add, left, right, out=torch.empty_like(left))


def _adam(values: int, device: torch.device) -> Run:
    weight = torch.nn.Parameter(torch.randn(values, device=device))
    weight.grad = torch.randn_like(weight)
    return torch.optim.AdamW([weight], fused=True).step
