import numpy as np
import pytest

from megatron_mosaic.errors import LayoutError
from megatron_mosaic.tokens.mask import dense
from megatron_mosaic.tokens.presets import Item, document_stops, preset_mask


def drawn(mask):
    return ["".join("x" if seen else "." for seen in row) for row in dense(mask)]


def test_causal_mask_takes_images_for_text_and_separates_documents():
    mask = preset_mask("causal", length=5, items=[Item(0, 2)], document_stops=[3, 4])

    assert drawn(mask) == ["x....", "xx...", "xxx..", "...x.", "....."]


def test_prefix_reaches_to_the_end_of_the_last_image_of_each_document():
    mask = preset_mask("prefix_lm", length=7, items=[Item(1, 2), Item(4, 6)], document_stops=[4, 7])

    assert drawn(mask) == [
        "xx.....",
        "xx.....",
        "xxx....",
        "xxxx...",
        "....xx.",
        "....xx.",
        "....xxx",
    ]


@pytest.mark.parametrize("preset", ["encoder_prepended", "encoder_embedded", "multimodal_packed"])
def test_images_before_the_text_see_themselves(preset):
    mask = preset_mask(preset, length=5, items=[Item(0, 2), Item(2, 3, modality=1)])

    assert drawn(mask) == ["xx...", "xx...", "..x..", "xxxx.", "xxxxx"]


def test_packed_documents_with_images_are_isolated():
    mask = preset_mask("multimodal_packed", length=5, items=[Item(1, 3)], document_stops=[1, 4, 5])

    assert drawn(mask) == ["x....", ".xx..", ".xx..", ".xxx.", "....x"]


def test_images_of_a_named_group_see_each_other():
    items = [Item(0, 1, group=0), Item(1, 2), Item(2, 3, group=0)]

    assert drawn(preset_mask("encoder_embedded", length=3, items=items)) == ["x.x", ".x.", "x.x"]


def test_image_that_padding_or_truncation_cuts_off_is_as_long_as_what_is_left():
    mask = preset_mask("encoder_embedded", length=3, items=[Item(1, 9), Item(9, 18)])

    assert drawn(mask) == ["x..", ".xx", ".xx"]


def test_sequence_of_padding_alone_sees_nothing():
    mask = preset_mask("multimodal_packed", length=2, items=[Item(0, 1)], document_stops=[])

    assert drawn(mask) == ["..", ".."]


@pytest.mark.parametrize(
    ("preset", "items", "stops", "message"),
    [
        ("encoder_embedded", [(0, 2), (1, 3)], None, "start=1 of an item must be >= 2"),
        ("multimodal_packed", [(0, 2)], [1, 4], "stop=2 of an item must be <= 1, where its doc"),
        ("multimodal_packed", [], [3, 2], "document_stop=2 must be > 3"),
        ("multimodal_packed", [], [2, 9], "document_stop=9 must be <= length=4"),
        ("encoder_embedded", [], [2, 4], "documents=2 must be 1 with mask=encoder_embedded"),
        ("encoder_prepended", [(1, 2)], None, "start=1 of an item must be 0 with mask=encoder_pre"),
    ],
)
def test_what_contradicts_itself_is_refused(preset, items, stops, message):
    items = [Item(*each) for each in items]

    with pytest.raises(LayoutError, match=message):
        preset_mask(preset, length=4, items=items, document_stops=stops)


def test_document_ids_become_the_ends_of_documents():
    assert document_stops(np.array([0, 0, 3, 4, 4, -1])) == [2, 3, 5]
    assert document_stops(np.array([-1, -1])) == []


def test_document_ids_that_run_backwards_are_refused():
    with pytest.raises(LayoutError, match="document=1 at position 2 must be >= 2 of the token"):
        document_stops(np.array([1, 2, 1]))


def test_padding_between_documents_is_refused():
    with pytest.raises(LayoutError, match="document=-1 at position 1 must not come before"):
        document_stops(np.array([0, -1, 1]))
