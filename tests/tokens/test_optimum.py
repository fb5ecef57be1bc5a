"""How far ``balanced`` is from the proven optimum, on cases that CP-SAT proves in a moment."""

import numpy as np
import pytest

from benchmarks.drawn_masks import Sizes, draw_mask
from benchmarks.optimal_deal import optimal_deal
from megatron_mosaic.tokens.assign import balanced
from megatron_mosaic.tokens.assignment import SequenceCut
from megatron_mosaic.tokens.tiles import tile_counts

SCATTERED = Sizes(text_sigma=1.3, document_sigma=0.9, images="log_uniform")
LARGE_IMAGES = Sizes(text_sigma=1.0, document_sigma=1.0, images="uniform")
RANKS_AND_BLOCKS = ((2, 8), (2, 16), (2, 32), (3, 8), (4, 8), (4, 16))
# 4 families of 2 seeds and 3 of one, each with 6 sizes: 66 cases of at most 64 blocks.
CASES = [(family, SCATTERED, seed) for family in ("EP", "EE", "EEg", "MP") for seed in range(2)]
CASES += [(family, LARGE_IMAGES, 2) for family in ("EE", "EEg", "MP")]


def optimum(costs, cp, found):
    best = optimal_deal(costs, cp, found)
    assert best.bound == best.most, "not proven"
    return best.most


@pytest.mark.parametrize(("cp", "blocks_per_rank"), RANKS_AND_BLOCKS)
@pytest.mark.parametrize(("family", "sizes", "seed"), CASES)
def test_most_loaded_rank_is_near_the_proven_optimum(family, sizes, seed, cp, blocks_per_rank):
    cut = SequenceCut(length=cp * blocks_per_rank * 128, cp=cp, block=128)
    mask = draw_mask(family, length=cut.length, seed=seed, sizes=sizes)
    costs = tile_counts(mask, edges=cut.edges, tile_keys=32)

    found = int(np.bincount(balanced(cut, costs).owner, weights=costs).max())

    assert found <= 1.003 * optimum(costs, cp, found)


def test_optimum_of_a_case_that_can_be_seen_at_once():
    # 9 + 1 + 5 and 8 + 4 + 4: 31 cannot be halved.
    assert optimum(np.array([9, 8, 5, 4, 4, 1]), 2, 31) == 16
