import numpy as np
import pytest

from benchmarks.drawn_masks import Sizes, draw_mask
from megatron_mosaic.tokens.assign import assign
from megatron_mosaic.tokens.mask import SequenceMask, padding, text
from megatron_mosaic.tokens.tiles import Tile, needed, tile_counts

TILE = Tile(128, 32)
SIZES = Sizes(text_sigma=1.3, document_sigma=0.9, images="log_uniform")


def received(mask, assignment):
    """Keys that each rank has of others, in tokens of pieces."""
    cut = assignment.cut
    counts = []
    for rank in range(cut.cp):
        seen = needed(mask, edges=cut.edges, queries=assignment.held(rank))
        counts.append(int(cut.sizes[seen & (assignment.owner != rank)].sum()))
    return counts


def tiles(mask, assignment):
    costs = tile_counts(mask, edges=assignment.cut.edges, tile_keys=TILE.keys)
    return np.bincount(assignment.owner, weights=costs, minlength=assignment.cut.cp)


def test_local_keeps_equal_documents_whole():
    # Eight documents for two ranks: four for each, and no key travels.
    mask = SequenceMask.of([text(512, document=each) for each in range(8)])

    found = assign(mask, cp=2, method="local", tile=TILE)

    assert received(mask, found) == [0, 0]
    assert found.tokens.tolist() == [2048, 2048]


@pytest.mark.parametrize("seed", range(3))
def test_local_holds_its_limits_with_little_traffic_on_packed_sequences(seed):
    mask = draw_mask("MP", length=131072, seed=seed, sizes=SIZES)

    found = assign(mask, cp=32, method="local", tile=TILE)

    loads = tiles(mask, found)
    by_position = assign(mask, cp=32, method="contiguous", tile=TILE)
    balanced = assign(mask, cp=32, method="balanced", tile=TILE)
    assert loads.max() <= 1.05 * loads.mean()
    assert found.tokens.max() <= 1.1 * found.tokens.mean()
    assert sum(received(mask, found)) <= 2.1 * sum(received(mask, by_position))
    assert sum(received(mask, found)) <= 0.3 * sum(received(mask, balanced))


def test_local_shares_one_long_document_between_all_ranks():
    mask = SequenceMask.of([text(32768)])

    found = assign(mask, cp=4, method="local", tile=TILE)

    loads = tiles(mask, found)
    assert loads.max() <= 1.05 * loads.mean()
    assert found.tokens.max() <= 1.1 * found.tokens.mean()


@pytest.mark.parametrize("place", ["start", "middle", "end"])
def test_local_gives_padding_away_like_any_tokens(place):
    documents = [text(700), text(900, document=1)]
    documents.insert({"start": 0, "middle": 1, "end": 2}[place], padding(500))
    mask = SequenceMask.of(documents)

    found = assign(mask, cp=3, method="local", tile=TILE)

    assert found.tokens.sum() == 2100
    assert found.tokens.max() <= 1.1 * 700


def test_local_of_padding_alone_is_divided_by_tokens():
    found = assign(SequenceMask.of([padding(4096)]), cp=2, method="local", tile=TILE)

    assert found.tokens.max() <= 1.1 * 2048


def test_local_takes_blocks_of_several_rows_of_tiles_where_a_rank_has_many():
    # 2^18 tokens for 2 ranks are 1024 rows of tiles each: blocks of 4096 leave 32.
    mask = SequenceMask.of([text(1 << 12, document=each) for each in range(64)])

    found = assign(mask, cp=2, method="local", tile=TILE)

    assert found.cut.block == 4096
    assert received(mask, found) == [0, 0]
