"""Operations whose efficiency the cost model asks for, at several sizes."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle, product
from pathlib import Path
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
        smallest: Smallest size of a multiplication; 0 if it is none.
    """

    curve: str
    size: float
    prepare: Callable[[], Run]
    smallest: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """How large the operations are.

    Args:
        square: Rows, columns and inner size of multiplications.
        rows: Rows of multiplications that are narrow: few tokens with wide weights.
        wide: Sizes of these weights, in either direction.
        experts: Experts that have rows each, and weights of all but the last of these sizes.
        sequence: Lengths of a sequence, for attention.
        heads: Heads of attention, of 128 values each.
        values: Values of a tensor, for what memory bounds.
    """

    square: tuple[int, ...]
    rows: tuple[int, ...]
    wide: tuple[int, ...]
    experts: int
    sequence: tuple[int, ...]
    heads: int
    values: tuple[int, ...]


HEAD_SIZE = 128
_MOST_COPIES = 256  # smaller tensors than such a share of a cache cost their launch alone
_ROW = 4096  # values of a token that is put in order

# A device's largest sizes come close to its limits; the smallest ones show what every operation
# costs. A CPU reaches its limits sooner, and takes longer.
SIZES: Mapping[tuple[str, bool], Sizes] = {
    ("cuda", False): Sizes(
        square=(256, 512, 1024, 2048, 4096, 8192),
        rows=(64, 128, 256, 512),
        wide=(1024, 4096, 8192),
        experts=8,
        sequence=(512, 1024, 2048, 4096, 8192),
        heads=16,
        values=(2**16, 2**20, 2**23, 2**25, 2**27),
    ),
    ("cuda", True): Sizes(
        square=(512, 2048, 4096),
        rows=(64, 256),
        wide=(1024, 4096, 8192),
        experts=8,
        sequence=(1024, 2048, 4096),
        heads=16,
        values=(2**16, 2**20, 2**23, 2**25),
    ),
    ("cpu", False): Sizes(
        square=(64, 128, 256, 512, 1024, 2048),
        rows=(4, 16, 64, 256),
        wide=(128, 512, 2048),
        experts=8,
        sequence=(128, 256, 512, 1024),
        heads=4,
        values=(2**12, 2**16, 2**20, 2**23, 2**25),
    ),
    ("cpu", True): Sizes(
        square=(64, 128, 256),
        rows=(4, 32),
        wide=(64, 128, 256),
        experts=4,
        sequence=(64, 128, 256),
        heads=2,
        values=(2**12, 2**16, 2**18, 2**20),
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
        yield from _multiplications(sizes, precision, device)
    yield from _attentions(sizes, device)
    for values in sizes.values:
        # Adding reads two tensors of 2 bytes a value and writes one.
        yield _memory_bound("elementwise", 6 * values, partial(_add, values, device), device)
    for values in sizes.values:
        # Rows in another order: reads 2 bytes a value and writes them.
        yield _memory_bound("permute", 4 * values, partial(_permute, values, device), device)
    for values in sizes.values[:-1]:  # each takes eight times the memory of the addition
        # Adam reads weight, gradient and both moments in fp32, and writes all but the gradient.
        yield _memory_bound("optimizer", 28 * values, partial(_adam, values, device), device)


def num_operations(device: torch.device, sizes: Sizes) -> int:
    """Operations that ``operations`` yields."""
    return sum(1 for _ in operations(device, sizes))


def _multiplications(sizes: Sizes, precision: str, device: torch.device) -> Iterator[Operation]:
    shapes = [(size, size) for size in sizes.square] + list(product(sizes.rows, sizes.wide))
    for rows, wide in shapes:
        yield Operation(
            f"matmul.{precision}",
            2 * rows * wide**2,
            partial(_matmul, rows, wide, precision, device),
            min(rows, wide),
        )
    if precision == "fp8":
        return  # the others need kernels that torch has not
    for rows, wide in shapes:
        yield Operation(
            f"weight_gradient.matmul.{precision}",
            2 * rows * wide**2,
            partial(_weight_gradient, rows, wide, precision, device),
            min(rows, wide),
        )
    for rows, wide in product(sizes.rows, sizes.wide[:-1]):
        yield Operation(
            f"grouped_matmul.{precision}",
            2 * sizes.experts * rows * wide**2,
            partial(_grouped_matmul, sizes.experts, rows, wide, precision, device),
            min(rows, wide),
        )


def _attentions(sizes: Sizes, device: torch.device) -> Iterator[Operation]:
    for length in sizes.sequence:
        # Scores and weighted values, 2 FLOPs each for every pair that a causal mask shows.
        pairs = length * (length + 1) / 2
        flops = 4 * pairs * sizes.heads * HEAD_SIZE
        shape = (1, sizes.heads, length, HEAD_SIZE)
        backward = FLASH_BACKWARD * flops
        yield Operation("attention.forward", flops, partial(_attention_forward, shape, device))
        yield Operation("attention.backward", backward, partial(_attention_backward, shape, device))


def _memory_bound(
    curve: str, size: int, prepare: Callable[[], Run], device: torch.device
) -> Operation:
    """Repeats an operation on other tensors each time, so that no cache holds them.

    In a step, too, most of what an operation reads was last touched long before.
    """

    def prepare_many() -> Run:
        copies = min(_MOST_COPIES, 1 + 2 * _cache_bytes(device) // size)
        runs = cycle([prepare() for _ in range(copies)])
        return lambda: next(runs)()

    return Operation(curve, size, prepare_many)


def _cache_bytes(device: torch.device) -> int:
    """Size of the last cache before the memory."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    # Linux lists the caches of a core, each with its size in KiB as "32768K".
    listed = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    return max((int(file.read_text().strip("K\n")) * 1024 for file in listed), default=0)


def _random(*shape: int, precision: str = "bf16", device: torch.device) -> torch.Tensor:
    return torch.randn(*shape, device=device).to(DTYPES[precision])


def _filled(*shape: int, device: torch.device) -> torch.Tensor:
    """Memory that is really there: an operating system shares pages of zeros."""
    return torch.ones(*shape, device=device, dtype=torch.bfloat16)


def _matmul(rows: int, wide: int, precision: str, device: torch.device) -> Run:
    tokens = _random(rows, wide, precision=precision, device=device)
    weights = _random(wide, wide, precision=precision, device=device)
    if precision == "fp8":
        scale = torch.ones((), device=device)
        return partial(
            torch._scaled_mm,
            tokens,
            weights.t(),  # the second operand lies column by column
            scale_a=scale,
            scale_b=scale,
            out_dtype=torch.bfloat16,
        )
    return partial(torch.mm, tokens, weights.t(), out=torch.empty_like(tokens))


def _weight_gradient(rows: int, wide: int, precision: str, device: torch.device) -> Run:
    tokens, gradient = (_random(rows, wide, precision=precision, device=device) for _ in range(2))
    total = _random(wide, wide, precision=precision, device=device)
    return partial(total.addmm_, gradient.t(), tokens)


def _grouped_matmul(
    experts: int, rows: int, wide: int, precision: str, device: torch.device
) -> Run:
    tokens = _random(experts, rows, wide, precision=precision, device=device)
    weights = _random(experts, wide, wide, precision=precision, device=device)
    return partial(torch.bmm, tokens, weights.mT, out=torch.empty_like(tokens))


def _attention_forward(shape: Sequence[int], device: torch.device) -> Run:
    query, key, value = (_random(*shape, device=device) for _ in range(3))
    return partial(F.scaled_dot_product_attention, query, key, value, is_causal=True)


def _attention_backward(shape: Sequence[int], device: torch.device) -> Run:
    query, key, value = (_random(*shape, device=device).requires_grad_() for _ in range(3))
    output = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    gradient = torch.randn_like(output)
    inputs = (query, key, value)
    return partial(torch.autograd.grad, output, inputs, gradient, retain_graph=True)


def _add(values: int, device: torch.device) -> Run:
    left, right = (_filled(values, device=device) for _ in range(2))
    return partial(torch.add, left, right, out=torch.empty_like(left))


def _permute(values: int, device: torch.device) -> Run:
    width = min(values, _ROW)
    rows = _filled(values // width, width, device=device)
    order = torch.randperm(len(rows), device=device)
    return partial(torch.index_select, rows, 0, order, out=torch.empty_like(rows))


def _adam(values: int, device: torch.device) -> Run:
    weight = torch.nn.Parameter(torch.ones(values, device=device))
    weight.grad = torch.ones_like(weight)
    return torch.optim.AdamW([weight], fused=True).step
