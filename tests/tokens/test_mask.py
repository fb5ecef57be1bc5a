import numpy as np
import pytest
from hypothesis import given, settings

from megatron_mosaic.errors import LayoutError
from megatron_mosaic.tokens.mask import (
    EVERYTHING,
    NO_DOCUMENT,
    Kind,
    Segment,
    SequenceMask,
    dense,
    modality_tokens,
    padding,
    text,
)
from megatron_mosaic.tokens.tiles import Tile, tile_map
from tests.tokens.masks import masks


def drawn(mask):
    """A row for each query; ``x`` where it sees the key."""
    return ["".join("x" if seen else "." for seen in row) for row in dense(mask)]


def sees(segments, query, key):
    """The rule in the words of the design, for one pair of (segment, position)."""
    (q, q_position), (k, k_position) = query, key
    if NO_DOCUMENT in (q.document, k.document) or q.document != k.document:
        return False
    if q.group >= 0 and q.group == k.group:
        return True
    return k_position <= q_position and q.sees & k.shown != 0


def test_mask_of_text_image_text_and_another_document():
    mask = SequenceMask.of(
        [text(2), modality_tokens(2, group=0), text(1), text(2, document=1), padding(1)]
    )

    assert drawn(mask) == [
        "x.......",
        "xx......",
        "..xx....",
        "..xx....",
        "xxxxx...",
        ".....x..",
        ".....xx.",
        "........",
    ]
    assert mask.kind.tolist() == [1, 2, 1, 1, 0]
    assert Kind(0) is Kind.PADDING


def test_images_of_one_group_see_each_other_and_not_what_lies_between():
    mask = SequenceMask.of(
        [modality_tokens(1, group=0), text(1), modality_tokens(2, group=0), text(1)]
    )

    assert drawn(mask) == ["x.xx.", "xx...", "x.xx.", "x.xx.", "xxxxx"]


@pytest.mark.parametrize(
    ("kind", "row"),
    [("own", "...x."), ("earlier_text", "x.xx."), ("earlier", "xxxx.")],
)
def test_image_tokens_see_what_they_are_allowed_before_them(kind, row):
    segments = [text(1), modality_tokens(1, group=0), text(1)]

    mask = SequenceMask.of([*segments, modality_tokens(1, group=1, sees=kind), text(1)])

    assert drawn(mask)[3] == row


@settings(max_examples=2000, deadline=None)
@given(masks(max_segments=6, max_length=5))
def test_dense_mask_follows_the_rule_pair_by_pair(mask):
    tokens = [segment for segment in mask.segments() for _ in range(segment.length)]
    pairs = list(zip(tokens, range(len(tokens)), strict=True))

    expected = [[sees(tokens, query, key) for key in pairs] for query in pairs]

    assert dense(mask).tolist() == expected


def test_segments_are_given_back():
    segments = (text(3), modality_tokens(2, group=4, modality=3), padding(1))

    assert SequenceMask.of(segments).segments() == segments
    assert segments[1] == Segment(2, 0, 4, 1 << 4, 0)
    assert segments[0].sees == EVERYTHING


def test_sequence_without_tokens_has_no_tiles():
    mask = SequenceMask.of([])

    assert mask.length == 0
    assert dense(mask).shape == (0, 0)


def test_sequence_of_padding_alone_computes_nothing():
    found = tile_map(SequenceMask.of([padding(100)]), tile=Tile(16, 16))

    assert found.num_rows == 7
    assert len(found.computed.row) == 0


def test_tokens_that_show_nothing_are_seen_by_nobody():
    segments = [Segment(1, shown=0), text(1)]
    mask = SequenceMask.of(segments)

    assert drawn(mask) == ["..", ".x"]
    assert tile_map(mask, tile=Tile(1, 1)).computed.start.tolist() == [1]


def test_documents_that_run_backwards_are_refused():
    with pytest.raises(LayoutError, match="document=0 must not come after document 1"):
        SequenceMask.of([text(1, document=1), padding(2), text(1)])


def test_segments_that_overlap_are_refused():
    with pytest.raises(LayoutError, match="length=-1 of segment 1 must be >= 1"):
        SequenceMask.of([text(3), text(-1)])


def test_too_many_modalities_are_refused():
    with pytest.raises(LayoutError, match=r"modality=61 must be in 0\.\.60"):
        modality_tokens(1, group=0, modality=61)


def test_negative_document_is_refused():
    with pytest.raises(LayoutError, match="document=-2 must be >= 0"):
        SequenceMask.of([text(1, document=-2)])


def test_tokens_outside_of_the_sequence_are_padding():
    codes = SequenceMask.of([text(2)]).of_tokens(np.array([1, 2, -1]))

    assert codes.document.tolist() == [0, NO_DOCUMENT, NO_DOCUMENT]
    assert codes.shown.tolist() == [1, 0, 0]
