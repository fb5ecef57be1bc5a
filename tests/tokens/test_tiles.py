from itertools import pairwise

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mosaic.tokens.mask import SequenceMask, dense, modality_tokens, text
from megatron_mosaic.tokens.tiles import (
    Held,
    Tile,
    needed,
    tile_counts,
    tile_map,
    visible_pairs,
)
from tests.tokens.masks import masks


@st.composite
def held_of(draw, length):
    """Some of the positions of a sequence, at least one."""
    chosen = draw(st.lists(st.booleans(), min_size=length, max_size=length))
    chosen[draw(st.integers(0, length - 1))] = True
    return held(np.flatnonzero(chosen))


def held(positions):
    """Stretches of consecutive positions."""
    breaks = np.flatnonzero(np.diff(positions) != 1)
    first = np.concatenate(([0], breaks + 1))
    last = np.concatenate((breaks, [len(positions) - 1]))
    return Held(positions[first], positions[last] + 1)


def positions_of(part):
    return np.concatenate([np.arange(*each) for each in zip(*part, strict=True)])


def blocks(matrix, rows, columns):
    """Yields row, column and the pairs of each tile of a matrix."""
    for row in range(-(-matrix.shape[0] // rows)):
        for column in range(-(-matrix.shape[1] // columns)):
            yield row, column, matrix[row * rows :, column * columns :][:rows, :columns]


def test_tile_over_keys_that_only_touch_where_some_are_not_held_is_full():
    mask = SequenceMask.of(
        [*(modality_tokens(1, group=0), text(1), modality_tokens(1, group=0)), text(1)]
    )
    images = Held(np.array([0, 2]), np.array([1, 3]))

    found = tile_map(mask, tile=Tile(1, 2), queries=images, keys=images)

    # Both queries see keys 0 and 2, which are the one tile of what is held.
    assert [each.tolist() for each in found.full] == [[0, 1], [0, 0]]


@settings(max_examples=2000, deadline=None)
@given(st.data())
def test_tile_map_of_parts_of_a_sequence_equals_the_dense_mask(data):
    mask = data.draw(masks())
    queries, keys = (data.draw(held_of(mask.length)) for _ in range(2))
    tile = Tile(data.draw(st.integers(1, 40)), data.draw(st.integers(1, 40)))
    part = dense(mask)[np.ix_(positions_of(queries), positions_of(keys))]

    found = tile_map(mask, tile=tile, queries=queries, keys=keys)

    seen = list(blocks(part, *tile))
    computed = {(row, column) for row, column, pairs in seen if pairs.any()}
    full = {
        (row, column) for row, column, pairs in seen if pairs.all() and pairs.shape[1] == tile.keys
    }
    assert (found.num_rows, found.num_columns) == (seen[-1][0] + 1, seen[-1][1] + 1)
    assert set(zip(*(each.tolist() for each in found.computed.numbers()), strict=True)) == computed
    assert set(zip(*(each.tolist() for each in found.full), strict=True)) == full


@settings(max_examples=200, deadline=None)
@given(masks(), st.data())
def test_tile_counts_and_pairs_equal_the_dense_mask(mask, data):
    inner = data.draw(st.sets(st.integers(1, mask.length))) | {0, mask.length}
    edges = np.array(sorted(inner))
    tile_keys = data.draw(st.integers(1, 40))
    matrix = dense(mask)

    counts = tile_counts(mask, edges=edges, tile_keys=tile_keys)

    expected = [
        sum(pairs.any() for _, _, pairs in blocks(matrix[first:stop], stop - first, tile_keys))
        for first, stop in pairwise(edges)
    ]
    assert counts.tolist() == expected
    assert visible_pairs(mask) == matrix.sum()


@settings(max_examples=200, deadline=None)
@given(masks(), st.data())
def test_needed_blocks_are_those_that_some_query_sees(mask, data):
    queries = data.draw(held_of(mask.length))
    inner = data.draw(st.sets(st.integers(1, mask.length))) | {0, mask.length}
    edges = np.array(sorted(inner))

    found = needed(mask, edges=edges, queries=queries)

    seen = dense(mask)[positions_of(queries)].any(axis=0)
    expected = [seen[first:stop].any() for first, stop in pairwise(edges)]
    assert found.tolist() == expected
    assert visible_pairs(mask, queries=queries) == dense(mask)[positions_of(queries)].sum()
