from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mosaic.errors import LayoutError
from megatron_mosaic.tokens.assign import assign, balanced, contiguous, longest_first
from megatron_mosaic.tokens.assign import zigzag as zigzag_of
from megatron_mosaic.tokens.assignment import SequenceCut, TokenAssignment
from megatron_mosaic.tokens.mask import SequenceMask, modality_tokens, text
from megatron_mosaic.tokens.tiles import Tile, tile_counts
from tests.tokens.masks import masks

METHODS = ("contiguous", "zigzag", "lpt", "balanced", "local")
LENGTHS = (1, 5, 57, 127, 283, 1000, 2003, 2176, 4096)
TILE = Tile(128, 32)


def causal(length):
    return SequenceMask.of([text(length)])


def embedded(length):
    """Text and an image of a third each, then text."""
    image = length // 3
    return SequenceMask.of([text(image), modality_tokens(image, group=0), text(length - 2 * image)])


def positions(assignment, rank):
    held = assignment.held(rank)
    return [place for each in zip(*held, strict=True) for place in range(*each)]


def loads(assignment, costs):
    return np.bincount(assignment.owner, weights=costs, minlength=assignment.cut.cp)


def blocks_of(assignment):
    """The blocks of every rank."""
    return [np.flatnonzero(assignment.owner == rank).tolist() for rank in range(assignment.cut.cp)]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("cp", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("length", LENGTHS)
def test_every_token_has_one_rank_and_ranks_keep_their_order(length, cp, method):
    found = assign(embedded(length), cp=cp, method=method, tile=TILE)

    held = [positions(found, rank) for rank in range(cp)]
    assert sorted(place for each in held for place in each) == list(range(length))
    assert all(before < after for each in held for before, after in pairwise(each))
    assert found.tokens.tolist() == [len(each) for each in held]


@pytest.mark.parametrize("method", ["zigzag", "balanced"])
@pytest.mark.parametrize("cp", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("length", LENGTHS)
def test_ranks_have_as_many_tokens_as_each_other_to_one(length, cp, method):
    tokens = assign(embedded(length), cp=cp, method=method, tile=TILE).tokens

    assert tokens.max() - tokens.min() <= 1


@pytest.mark.parametrize("cp", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("length", LENGTHS)
def test_contiguous_ranks_hold_one_stretch_each(length, cp):
    found = assign(causal(length), cp=cp, method="contiguous", tile=TILE)

    assert all(len(found.held(rank).start) <= 1 for rank in range(cp))
    assert abs(found.tokens - length / cp).max() <= TILE.queries


@settings(max_examples=200, deadline=None)
@given(masks(), st.integers(1, 5), st.sampled_from(METHODS), st.sampled_from((1, 2, 4)))
def test_assignment_of_any_mask_is_complete_and_the_same_each_time(mask, cp, method, rows):
    first, second = (assign(mask, cp=cp, method=method, tile=Tile(16 * rows, 8)) for _ in range(2))

    assert first.owner.tolist() == second.owner.tolist()
    assert first.tokens.sum() == mask.length
    if method == "balanced":
        assert np.ptp(first.tokens) <= 1


@pytest.mark.parametrize("cp", [2, 4, 8, 16, 32])
@pytest.mark.parametrize("rounds", [1, 2, 5])
def test_zigzag_balances_causal_text_exactly_at_multiples_of_its_chunks(cp, rounds):
    # Block b sees 4 * (b + 1) tiles: chunks i and 2 cp - 1 - i together always as many.
    cut = SequenceCut(length=2 * cp * rounds * 128, cp=cp, block=128)
    costs = tile_counts(causal(cut.length), edges=cut.edges, tile_keys=32)

    assert costs.tolist() == [4 * (block + 1) for block in range(cut.num_pieces)]
    assert len(set(loads(zigzag_of(cut), costs))) == 1


@pytest.mark.parametrize(("cp", "ratio"), [(2, 1.5), (4, 1.75), (8, 1.875), (32, 1.96875)])
def test_contiguous_ranks_of_causal_text_wait_for_the_last(cp, ratio):
    # Of n blocks the last n / cp see n (n + 1) / 2 - (n - n / cp)(n - n / cp + 1) / 2 of
    # n (n + 1) / 2, nearly 2 - 1 / cp times the mean.
    cut = SequenceCut(length=4096 * 128, cp=cp, block=128)
    costs = tile_counts(causal(cut.length), edges=cut.edges, tile_keys=32)

    found = loads(contiguous(cut), costs)

    assert found.max() / found.mean() == pytest.approx(ratio, rel=5e-4)


@pytest.mark.parametrize("num_blocks", [8, 16, 24])
def test_longest_first_deals_causal_blocks_back_and_forth(num_blocks):
    # The dearest four to ranks 0..3, the next four to 3..0, which are then alike, and again.
    cut = SequenceCut(length=num_blocks * 128, cp=4, block=128)
    costs = tile_counts(causal(cut.length), edges=cut.edges, tile_keys=32)

    found = blocks_of(longest_first(cut, costs))

    last = num_blocks - 1
    assert found == [
        sorted(
            last - 8 * turn - place for turn in range(num_blocks // 8) for place in (rank, 7 - rank)
        )
        for rank in range(4)
    ]


def test_longest_first_gives_the_next_block_to_the_least_loaded_rank():
    # 7 | 0, 7 | 6, 7 | 11, 11 | 11, 13 | 11 (equal loads: the lower rank), 13 | 12.
    cut = SequenceCut(length=6, cp=2, block=1)

    found = longest_first(cut, np.array([1, 4, 7, 2, 5, 6]))

    assert blocks_of(found) == [[1, 2, 3], [0, 4, 5]]


def test_balanced_exchanges_blocks_that_rounds_have_dealt_unevenly():
    # In rounds 9 | 8, 13 | 13 (4 and 5), 14 | 17 (1 and 4); of 31, 15 | 16 is the best there is.
    cut = SequenceCut(length=6, cp=2, block=1)
    costs = np.array([9, 8, 5, 4, 4, 1])

    found = loads(balanced(cut, costs), costs)

    assert sorted(found.tolist()) == [15, 16]


@pytest.mark.parametrize("cp", [2, 4])
@pytest.mark.parametrize("length", LENGTHS)
def test_rows_of_a_ranks_tiles_are_blocks_so_that_nothing_is_computed_twice(length, cp):
    # What ranks compute together is what the blocks cost, whichever rank has them.
    mask = embedded(length)
    found = assign(mask, cp=cp, method="balanced", tile=TILE)

    computed = 0
    for rank in range(cp):
        held = found.held(rank)
        edges = np.append(np.arange(0, held.size, TILE.queries), held.size)
        if held.size:
            computed += tile_counts(mask, edges=edges, tile_keys=TILE.keys, queries=held).sum()

    assert computed == tile_counts(mask, edges=found.cut.edges, tile_keys=TILE.keys).sum()


def test_sequence_below_one_block_is_cut_evenly():
    found = assign(causal(5), cp=4, method="balanced", tile=TILE)

    assert found.tokens.tolist() == [1, 1, 1, 2]
    assert found.local_length() == 2
    assert found.local_length(multiple=4) == 4


def test_ranks_without_tokens_hold_nothing():
    found = assign(causal(1), cp=4, method="zigzag", tile=TILE)

    assert sorted(found.tokens.tolist()) == [0, 0, 0, 1]
    assert [found.held(rank).size for rank in range(4)] == found.tokens.tolist()


def test_sequence_without_tokens_is_refused():
    with pytest.raises(LayoutError, match="tokens: length=0 must be >= 1"):
        assign(SequenceMask.of([]), cp=2, method="balanced", tile=TILE)


def test_rank_outside_of_the_group_is_refused():
    cut = SequenceCut(length=2, cp=2, block=1)

    with pytest.raises(LayoutError, match=r"owner=0\.\.2 must be in 0\.\.1"):
        TokenAssignment(cut=cut, owner=np.array([0, 2]))
    with pytest.raises(LayoutError, match="owner=1 must number the pieces=2"):
        TokenAssignment(cut=cut, owner=np.array([0]))
