"""The operator on ranks against one process with a dense mask."""

from dataclasses import replace
from functools import cache

import pytest
import torch
import torch.distributed as dist

from megatron_mosaic.attention.operator import multimodal_attention
from megatron_mosaic.comm.record import record
from tests.attention.cases import ITEMS, PRESETS, Case, difference, reference
from tests.ranks import run_ranks

METHODS = ("contiguous", "zigzag", "lpt", "balanced")
# Every preset with every length, every method with each preset and with each length.
SQUARE = [
    Case(preset=preset, length=length, method=METHODS[(i + j) % 4])
    for i, preset in enumerate(PRESETS)
    for j, length in enumerate(ITEMS)
]
SHAPES = [
    Case(preset="encoder_embedded", length=283, heads=6, groups=3, head_dim=8),
    Case(preset="encoder_embedded", length=283, heads=2, groups=2, head_dim=256),
    Case(preset="multimodal_packed", length=283, spare_slots=5, exchange="all_gather"),
    Case(preset="prefix_lm", length=1000, exchange="all_gather"),
    Case(preset="multimodal_packed", length=1000, exchange="auto"),
]
CASES = SQUARE + SHAPES
ROUNDED = Case(preset="encoder_embedded", length=283, dtype=torch.bfloat16, groups=2)


def _compute(case, rank, cp, group):
    """Output and gradients of a rank, and what its all-to-all calls sent."""
    *tensors, grad = (case.local(each, rank, cp) for each in case.tensors())
    leaves = [each.requires_grad_() for each in tensors]
    with record() as entries:
        out = multimodal_attention(
            *leaves,
            masks=case.masks(),
            assignments=case.assignments(cp),
            group=group,
            exchange=case.exchange,
        )
        out.backward(grad)
    sent = [(each.operation, each.num_bytes) for each in entries if hasattr(each, "operation")]
    return [out.detach(), *(leaf.grad for leaf in leaves)], sent


def _on_rank(rank, cases, cp):
    group = dist.group.WORLD if cp > 1 else None
    return [_compute(case, rank, cp, group) for case in cases]


@cache
def _computed(cp):
    """Of every case the whole tensors, and what each rank sent."""
    cases = [*CASES, ROUNDED, *CASES[-2:]]
    ranks = run_ranks(_on_rank, cp, cases, cp) if cp > 1 else [_on_rank(0, cases, 1)]
    whole, sent = [], []
    for number, case in enumerate(cases):
        parts = [rank[number][0] for rank in ranks]
        whole.append([case.whole(each) for each in zip(*parts, strict=True)])
        sent.append([rank[number][1] for rank in ranks])
    return whole, sent


@pytest.mark.parametrize("cp", [1, 2, 4])
def test_operator_equals_one_process_with_a_dense_mask(cp):
    whole, _ = _computed(cp)

    for case, found in zip(CASES, whole, strict=False):
        for tensor, expected in zip(found, reference(case), strict=True):
            assert difference(tensor, expected) < 1e-5, case


@pytest.mark.parametrize("cp", [1, 2, 4])
def test_operator_rounds_as_bf16_does(cp):
    found = _computed(cp)[0][len(CASES)]

    # bf16 has 8 bits: each rounding is off by 2 ** -9 of a value, and there are a few of them.
    for tensor, expected in zip(found, reference(ROUNDED), strict=True):
        assert tensor.dtype == torch.bfloat16
        assert difference(tensor, expected) < 4 * 2**-9


@pytest.mark.parametrize("cp", [1, 2, 4])
def test_operator_computes_the_same_bits_again(cp):
    whole, _ = _computed(cp)

    for first, second in zip(whole[len(CASES) - 2 : len(CASES)], whole[-2:], strict=True):
        assert all(map(torch.equal, first, second))


