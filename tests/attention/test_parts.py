"""Kernels of a part of the keys, on parts of random masks."""

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mosaic.attention.codes import SlotCodes, visible
from megatron_mosaic.attention.dense import DenseKernel
from megatron_mosaic.attention.flex import FlexKernel
from megatron_mosaic.attention.merge import merge
from megatron_mosaic.attention.part import Part
from megatron_mosaic.tokens.mask import dense
from megatron_mosaic.tokens.presets import Item, preset_mask
from tests.tokens.masks import masks
from tests.tokens.test_tiles import held, held_of, positions_of

CPU = torch.device("cpu")


@st.composite
def parts(draw, max_length=24, max_segments=8):
    """Some queries and keys of two sequences, in slots of which some are padding."""
    samples = [draw(masks(max_length=max_length, max_segments=max_segments)) for _ in range(2)]
    queries, keys = ([draw(held_of(mask.length)) for mask in samples] for _ in range(2))
    query_slots = max(each.size for each in queries) + draw(st.integers(0, 3))
    key_slots = max(each.size for each in keys) + draw(st.integers(0, 3))
    return Part(
        masks=samples,
        queries=queries,
        query_slots=query_slots,
        keys=keys,
        key_slots=key_slots,
        device=CPU,
    )


def seen_by(part):
    """The dense mask of a part, ``[b, query slots, key slots]``."""
    seen = np.zeros((len(part.masks), part.query_slots, part.key_slots), dtype=np.bool_)
    for sample, mask in enumerate(part.masks):
        queries, keys = positions_of(part.queries[sample]), positions_of(part.keys[sample])
        seen[sample, : len(queries), : len(keys)] = dense(mask)[np.ix_(queries, keys)]
    return torch.from_numpy(seen)


def codes_of(part):
    query, key = part.codes
    return (
        SlotCodes(*(each[:, :, None] for each in query)),
        SlotCodes(*(each[:, None, :] for each in key)),
    )


@settings(max_examples=200, deadline=None)
@given(parts())
def test_codes_say_what_the_mask_says(part):
    assert torch.equal(visible(*codes_of(part)), seen_by(part))


@settings(max_examples=60, deadline=None)
@given(parts(max_length=150, max_segments=6))
def test_block_mask_has_the_tiles_of_the_dense_mask(part):
    block_mask = FlexKernel(part=part).block_mask

    seen = seen_by(part)
    tiles = np.zeros((2, -(-part.query_slots // 128), -(-part.key_slots // 128)), dtype=np.bool_)
    for row in range(tiles.shape[1]):
        for column in range(tiles.shape[2]):
            pairs = seen[:, row * 128 :, column * 128 :][:, :128, :128]
            tiles[:, row, column] = pairs.flatten(1).any(dim=1)
    assert block_mask.shape == (2, 1, part.query_slots, part.key_slots)
    assert torch.equal(block_mask.to_dense()[:, 0].bool(), torch.from_numpy(tiles))
    assert _listed(block_mask.kv_num_blocks, block_mask.kv_indices) == _listed(
        block_mask.q_num_blocks, block_mask.q_indices, transposed=True
    )
    full = _listed(block_mask.full_kv_num_blocks, block_mask.full_kv_indices)
    assert full == _listed(block_mask.full_q_num_blocks, block_mask.full_q_indices, transposed=True)
    for sample, row, column in full:
        assert seen[sample, row * 128 :, column * 128 :][:128, :128].all()


def _listed(counts, indices, *, transposed=False):
    """Tiles of lists, as sample, row and column; asserts that those of a row ascend."""
    tiles = set()
    for sample, row in np.ndindex(counts.shape[0], counts.shape[2]):
        columns = indices[sample, 0, row, : counts[sample, 0, row]].tolist()
        assert columns == sorted(set(columns))
        tiles |= {(sample, c, row) if transposed else (sample, row, c) for c in columns}
    return tiles


def _flex(part, *tensors):
    with warnings.catch_warnings():
        # That it writes out all scores without compilation is what a host is for here.
        warnings.filterwarnings("ignore", message="flex_attention called without")
        return FlexKernel(part=part).attend(*tensors, scale=0.3)


def test_flex_attention_computes_what_the_dense_kernel_does():
    generator = torch.Generator().manual_seed(3)
    samples = [
        preset_mask("encoder_embedded", length=500, items=[Item(40, 300)], document_stops=[450]),
        preset_mask("multimodal_packed", length=500, document_stops=[200, 500]),
    ]
    queries = [held(np.r_[0:128, 256:384]), held(np.r_[128:256, 384:500])]
    keys = [held(np.r_[128:256, 384:500]), held(np.r_[0:128, 256:384])]
    part = Part(
        masks=samples, queries=queries, query_slots=260, keys=keys, key_slots=384, device=CPU
    )
    tensors = [
        torch.randn(2, heads, slots, 16, generator=generator)
        for heads, slots in ((4, 260), (2, 384), (2, 384))
    ]

    out, lse = _flex(part, *tensors)

    expected, expected_lse = DenseKernel(part=part).attend(*tensors, scale=0.3)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, expected_lse)


def test_merged_parts_are_attention_to_all_keys():
    mask = preset_mask("prefix_lm", length=90, items=[Item(20, 50)], document_stops=[80])
    everything, even, odd = np.arange(90), np.arange(0, 90, 2), np.arange(1, 90, 2)
    generator = torch.Generator().manual_seed(3)
    query, key, value = (torch.randn(1, 2, 90, 8, generator=generator) for _ in range(3))

    def attend(positions):
        part = Part(
            masks=[mask],
            queries=[held(everything)],
            query_slots=90,
            keys=[held(positions)],
            key_slots=len(positions),
            device=CPU,
        )
        chosen = (query, key[:, :, positions], value[:, :, positions])
        return DenseKernel(part=part).attend(*chosen, scale=1.0)

    torch.testing.assert_close(merge([attend(even), attend(odd)]), attend(everything)[0])


@pytest.mark.parametrize("scores", [1, 1000])
def test_dense_kernel_computes_the_same_in_pieces(scores, monkeypatch):
    mask = preset_mask("prefix_lm", length=40, items=[Item(5, 20)], document_stops=[30])
    part = Part(
        masks=[mask],
        queries=[held(np.arange(40))],
        query_slots=40,
        keys=[held(np.arange(40))],
        key_slots=40,
        device=CPU,
    )
    generator = torch.Generator().manual_seed(3)
    tensors = [torch.randn(1, 2, 40, 8, generator=generator) for _ in range(3)]

    def gradients():
        leaves = [each.clone().requires_grad_() for each in tensors]
        out, lse = DenseKernel(part=part).attend(*leaves, scale=1.0)
        (out.square().sum() + lse[:, :, :30].square().sum()).backward()
        return [leaf.grad for leaf in leaves]

    whole = gradients()
    monkeypatch.setattr("megatron_mosaic.attention.dense._SCORES", scores)

    for found, expected in zip(gradients(), whole, strict=True):
        torch.testing.assert_close(found, expected)
