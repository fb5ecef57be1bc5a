"""Ways to compute attention under the same mask, forward and backward."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from megatron_mosaic.attention.codes import SlotCodes, visible
from megatron_mosaic.attention.dense import DenseKernel
from megatron_mosaic.attention.flex import FlexKernel, mask_mod_of
from megatron_mosaic.attention.merge import merge, merge_grads
from megatron_mosaic.attention.needed import NeededKeys
from megatron_mosaic.attention.part import Kernel, Part
from megatron_mosaic.tokens.assign import assign
from megatron_mosaic.tokens.held import Held, whole
from megatron_mosaic.tokens.mask import SequenceMask
from megatron_mosaic.tokens.names import Method
from megatron_mosaic.tokens.tiles import KERNEL_TILE

_ROWS_AT_A_TIME: Final = 4096  # of a dense mask: what is compared on the way takes little memory


@dataclass(kw_only=True)
class Arm:
    """One way.

    Args:
        name: For people.
        make: Makes the mask.
        run: Runs forward and backward once under it.
        causal: Whether it computes the causal mask instead.
        prepare_s: Time to make the mask, once it is made.
        failed: Why it cannot run.
    """

    name: str
    make: Callable[[], Any]
    run: Callable[[Any], object]
    causal: bool = False
    prepare_s: float | None = None
    failed: str | None = None
    made: Any = None

    def prepare(self) -> None:
        """Makes the mask, its copies to the device included."""
        if self.prepare_s is not None:
            return
        self.make()  # once for what is compiled on the way
        start_s = time.perf_counter()
        self.made = self.make()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.prepare_s = time.perf_counter() - start_s

    def step(self) -> object:
        """Runs forward and backward once."""
        return self.run(self.made)


def arms(mask: SequenceMask, tensors: Sequence[torch.Tensor]) -> list[Arm]:
    """All ways, the first of them twice.

    Args:
        mask: Mask of the sequence.
        tensors: Queries, keys, values and the gradient of the output, ``[s, 1, heads, d]``.
    """
    query, key, value, grad = (each.permute(1, 2, 0, 3).contiguous() for each in tensors)
    leaves = [each.requires_grad_() for each in (query, key, value)]
    everything = whole(mask.length)

    def part() -> Part:
        return _part(mask, everything, everything, mask.length, query.device)

    def mosaic(kernel: Kernel) -> object:
        out, _ = kernel.attend(*leaves, scale=query.size(-1) ** -0.5)
        return torch.autograd.grad(out, leaves, grad.to(out.dtype))

    def causal(_: None) -> object:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            out = F.scaled_dot_product_attention(
                leaves[0], leaves[1], leaves[2], is_causal=True, enable_gqa=True
            )
        return torch.autograd.grad(out, leaves, grad)

    return [
        Arm(name="mosaic", make=lambda: _kernel(part()), run=mosaic),
        _flex(part(), leaves, grad),
        _dense_sdpa(part(), leaves, grad),
        Arm(name="causal_flash", make=lambda: None, run=causal, causal=True),
        Arm(name="mosaic_again", make=lambda: _kernel(part()), run=mosaic),
    ]


def _flex(part: Part, leaves: Sequence[torch.Tensor], grad: torch.Tensor) -> Arm:
    """FlexAttention with the block mask that torch makes from the rule."""
    on_host = part.device.type == "cpu"
    attend = flex_attention if on_host else torch.compile(flex_attention)

    def make() -> object:
        # Compiled, as it would write out the whole matrix.
        create = create_block_mask if on_host else torch.compile(create_block_mask)
        num = part.query_slots
        return create(mask_mod_of(*part.codes), 1, None, num, num, device=str(part.device))

    def run(block_mask: Any) -> object:
        # There is no backward pass of it on a host.
        query, key, value = (each.detach() if on_host else each for each in leaves)
        out = attend(query, key, value, block_mask=block_mask, enable_gqa=True)
        return out if on_host else torch.autograd.grad(out, leaves, grad)

    return Arm(name="flex", make=make, run=run)


def _dense_sdpa(part: Part, leaves: Sequence[torch.Tensor], grad: torch.Tensor) -> Arm:
    """SDPA with the mask as a matrix, and keys repeated as its kernels with a mask want them."""
    repeats = leaves[0].size(1) // leaves[1].size(1)

    def make() -> torch.Tensor:
        query, key = part.codes
        rows = []
        for first in range(0, part.query_slots, _ROWS_AT_A_TIME):
            some = query.select(slice(first, first + _ROWS_AT_A_TIME))
            rows.append(
                visible(
                    SlotCodes(*(each[:, None, :, None] for each in some)),
                    SlotCodes(*(each[:, None, None, :] for each in key)),
                )
            )
        return torch.cat(rows, dim=2)

    def run(seen: torch.Tensor) -> object:
        keys = [each.repeat_interleave(repeats, dim=1) for each in leaves[1:]]
        out = F.scaled_dot_product_attention(leaves[0], *keys, attn_mask=seen)
        return torch.autograd.grad(out, leaves, grad)

    return Arm(name="dense_sdpa", make=make, run=run)


def simulated_ranks(
    mask: SequenceMask, tensors: Sequence[torch.Tensor], *, cp: int, method: Method
) -> list[Arm]:
    """What each rank of a group computes, with the keys of others there already.

    Args:
        mask: Mask of the sequence.
        tensors: Queries, keys, values and the gradient of the output, ``[s, 1, heads, d]``.
        cp: Ranks.
        method: How tokens are assigned.
    """
    assignment = assign(mask, cp=cp, method=method, tile=KERNEL_TILE)
    needed = NeededKeys.of(mask, assignment)
    query, key, value, grad = (each.permute(1, 2, 0, 3) for each in tensors)
    found = []
    for rank in range(cp):
        own, received = assignment.held(rank), needed.received(rank)
        slots = -(-received.size // KERNEL_TILE.keys) * KERNEL_TILE.keys  # as the operator has them
        parts = [_part(mask, own, own, own.size, grad.device)]
        keys = [[_leaf(each, own, own.size) for each in (key, value)]]
        if slots:
            parts.append(_part(mask, own, received, slots, grad.device))
            keys.append([_leaf(each, received, slots) for each in (key, value)])
        run = _rank_run(_leaf(query, own, own.size), keys, _leaf(grad, own, own.size).detach())
        make = partial(_kernels, parts)
        found.append(Arm(name=f"rank {rank}", make=make, run=run))
    return found


def _rank_run(
    query: torch.Tensor, keys: Sequence[Sequence[torch.Tensor]], grad: torch.Tensor
) -> Callable[[Sequence[Kernel]], object]:
    """Forward and backward of a rank as the operator has them, without the exchange."""
    scale = query.size(-1) ** -0.5

    def run(kernels: Sequence[Kernel]) -> object:
        parts = [
            kernel.attend(query, *pair, scale=scale)
            for kernel, pair in zip(kernels, keys, strict=True)
        ]
        merge([(out.detach(), lse.detach()) for out, lse in parts])
        grads = merge_grads(grad, parts)
        return [
            torch.autograd.grad(part, (query, *pair), of_part)
            for part, pair, of_part in zip(parts, keys, grads, strict=True)
        ]

    return run


def _part(
    mask: SequenceMask, queries: Held, keys: Held, key_slots: int, device: torch.device
) -> Part:
    return Part(
        masks=[mask],
        queries=[queries],
        query_slots=queries.size,
        keys=[keys],
        key_slots=key_slots,
        device=device,
    )


def _kernel(part: Part) -> Kernel:
    """The kernel that the operator takes, with its mask made."""
    if part.device.type == "cpu":
        kernel = DenseKernel(part=part)
        _ = part.codes
        return kernel
    kernel = FlexKernel(part=part)
    _ = kernel.block_mask
    return kernel


def _kernels(parts: Sequence[Part]) -> list[Kernel]:
    return [_kernel(part) for part in parts]


def _leaf(tensor: torch.Tensor, held: Held, slots: int) -> torch.Tensor:
    """Some tokens of a tensor in slots of their own, zeros behind them."""
    chosen = tensor.new_zeros(*tensor.shape[:2], slots, tensor.size(3))
    places = torch.from_numpy(held.position(np.arange(held.size))).to(tensor.device)
    chosen[:, :, : held.size] = tensor.detach()[:, :, places]
    return chosen.requires_grad_()
