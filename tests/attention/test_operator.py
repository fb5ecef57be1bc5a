"""The operator on ranks against one process with a dense mask."""

from functools import cache

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

from megatron_mosaic.attention.operator import multimodal_attention
from megatron_mosaic.comm.record import record
from megatron_mosaic.comm.replay import Issue
from megatron_mosaic.tokens.assignment import SequenceCut, TokenAssignment
from megatron_mosaic.tokens.mask import dense
from megatron_mosaic.tokens.presets import preset_mask
from tests.attention.cases import ITEMS, PRESETS, Case, difference, reference
from tests.ranks import run_ranks

METHODS = ("contiguous", "zigzag", "lpt", "balanced", "local")
# Every preset and every method with every length.
SQUARE = [
    Case(preset=preset, length=length, method=METHODS[(i + j) % 5], heads=1 + (length < 2000))
    for i, preset in enumerate(PRESETS)
    for j, length in enumerate(ITEMS)
]
SHAPES = [
    Case(preset="encoder_embedded", length=283, heads=6, groups=3, head_dim=8),
    Case(preset="encoder_embedded", length=283, heads=2, groups=2, head_dim=256),
    Case(preset="multimodal_packed", length=283, spare_slots=5, exchange="all_gather"),
    Case(preset="prefix_lm", length=1000, exchange="all_gather"),
    Case(preset="causal", length=3),  # there are more ranks than tokens
    Case(preset="multimodal_packed", length=1000, exchange="auto"),
]
RANDOM = [
    Case(
        seed=seed,
        length=97,
        method=METHODS[seed % 5],
        head_dim=8,
        exchange=("auto", "blocks")[seed % 2],
    )
    for seed in range(30)
]
CASES = [*SQUARE, *RANDOM, *SHAPES]
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
    sent = [(each.operation, each.num_bytes) for each in entries if isinstance(each, Issue)]
    return [out.detach(), *(leaf.grad for leaf in leaves)], sent


def _on_rank(rank, cases, cp):
    group = dist.group.WORLD if cp > 1 else None
    return [_compute(case, rank, cp, group) for case in cases], _recompute(rank, cp, group)


def _recompute(rank, cp, group):
    """Gradients as they are, and where forward runs again before backward, in both manners."""
    case = SQUARE[-3]
    *tensors, grad = (case.local(each, rank, cp) for each in case.tensors())

    def attend(query, key, value):
        options = {"masks": case.masks(), "assignments": case.assignments(cp), "group": group}
        return multimodal_attention(query, key, value, **options)

    found = []
    for reentrant in (None, True, False):
        leaves = [each.clone().requires_grad_() for each in tensors]
        if reentrant is None:
            out = attend(*leaves)
        else:
            out = checkpoint(attend, *leaves, use_reentrant=reentrant)
        out.backward(grad)
        found.append([leaf.grad for leaf in leaves])
    return found


@cache
def _computed(cp):
    """Of every case the whole tensors, what each rank sent; and the recomputed gradients."""
    cases = [*CASES, ROUNDED, *CASES[-2:]]
    ranks = run_ranks(_on_rank, cp, cases, cp, timeout_s=300) if cp > 1 else [_on_rank(0, cases, 1)]
    whole, sent = [], []
    for number, case in enumerate(cases):
        parts = [rank[0][number][0] for rank in ranks]
        whole.append([case.whole(each) for each in zip(*parts, strict=True)])
        sent.append([rank[0][number][1] for rank in ranks])
    return whole, sent, [rank[1] for rank in ranks]


@pytest.mark.parametrize("cp", [1, 2, 4])
def test_operator_equals_one_process_with_a_dense_mask(cp):
    whole = _computed(cp)[0]

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
    whole = _computed(cp)[0]

    for first, second in zip(whole[len(CASES) - 2 : len(CASES)], whole[-2:], strict=True):
        assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("cp", [1, 2, 4])
def test_recomputation_gives_the_same_bits(cp):
    for plain, *again in _computed(cp)[2]:
        for gradients in again:
            assert all(map(torch.equal, plain, gradients))


def _needed_rows(case, cp):
    """Keys that each rank has and others need, ``[owner, needing]``, from the dense masks."""
    rows = np.zeros((cp, cp), dtype=np.int64)
    for mask, assignment in zip(case.masks(), case.assignments(cp), strict=True):
        matrix, owner = dense(mask), np.repeat(assignment.owner, assignment.cut.sizes)
        for rank in range(cp):
            seen = matrix[owner == rank].any(axis=0)
            blocks = np.logical_or.reduceat(seen, assignment.cut.edges[:-1])
            for peer in range(cp):
                sizes = assignment.cut.sizes[blocks & (assignment.owner == peer)]
                rows[peer, rank] += sizes.sum() if peer != rank else 0
    return rows


@pytest.mark.parametrize("cp", [2, 4])
def test_blocks_that_are_needed_travel_and_nothing_else(cp):
    for case, sent in zip(SQUARE, _computed(cp)[1], strict=False):
        rows = _needed_rows(case, cp)

        # A key and a value of 16 channels in 4 bytes each; gradients go the other way.
        row_bytes = 2 * 16 * 4
        for rank in range(cp):
            expected = [rows[rank].sum() * row_bytes, rows[:, rank].sum() * row_bytes]
            assert sent[rank] == [("all_to_all", n) for n in expected] * bool(rows.any())


def test_all_gather_sends_all_keys_and_returns_gradients_of_those_needed():
    case = SHAPES[3]
    sent = _computed(4)[1][CASES.index(case)]

    # 250 slots of 2 samples, a key and a value of 16 channels in 4 bytes each.
    returned = _needed_rows(case, 4).sum(axis=0) * 128
    assert sent == [[("all_gather", 250 * 2 * 128), ("all_to_all", n)] for n in returned]


def test_nothing_travels_where_no_rank_sees_keys_of_another():
    mask = preset_mask("multimodal_packed", length=64, document_stops=[32, 64])
    cut = SequenceCut(length=64, cp=2, block=32)
    halves = TokenAssignment(cut=cut, owner=np.array([0, 1]))

    assert run_ranks(_attend_to_halves, 2, mask, halves) == [0, 0]


def _attend_to_halves(rank, mask, assignment):
    leaves = [torch.ones(32, 1, 1, 8, requires_grad=True) for _ in range(3)]
    with record() as entries:
        out = multimodal_attention(
            *leaves, masks=[mask], assignments=[assignment], group=dist.group.WORLD
        )
        out.sum().backward()
    return len(entries)
