"""What a batch says of the masks of its samples, and how their tokens are counted."""

import numpy as np
import pytest
import torch

from megatron_mosaic.errors import HostError
from megatron_mosaic.host.data.facts import FactsLayout, SampleFacts
from megatron_mosaic.host.families.llava_masks import check_masks, stops_of_batch
from megatron_mosaic.host.rotary import document_positions, grid_positions
from megatron_mosaic.layout.attention import AttentionPlan
from megatron_mosaic.layout.rows import Interval
from megatron_mosaic.layout.sequences import SampleSequence
from megatron_mosaic.tokens.mask import SequenceMask, modality_tokens, padding, text
from tests.host.test_bad_launch import _check, _stop
from tests.ranks import run_ranks

IMAGE = -200
PACKED = AttentionPlan(mask="multimodal_packed")


def _stops(tokens, *, attention=PACKED, length=32, **fields):
    batch = {"tokens": torch.tensor([tokens]), **fields}
    (stops,) = stops_of_batch(
        batch, attention=attention, image_token=IMAGE, rows_per_image=4, sequence_length=length
    )
    return stops


def test_documents_end_behind_the_rows_of_their_images():
    ids = torch.tensor([[0, 0, 0, 1, 1, -1]])

    # Tokens end at 1, 2, 6 (an image of 4 rows), 7, 11 (another one) and 12.
    assert _stops([5, 5, IMAGE, 5, IMAGE, 0], document_ids=ids) == (6, 11)


def test_cumulative_lengths_of_packed_samples_are_ends_of_documents():
    lengths = torch.tensor([[0, 6, 11, 11]], dtype=torch.int32)

    assert _stops([5, 5, IMAGE, 5, IMAGE, 0], cu_lengths=lengths) == (6, 11)


def test_sample_that_is_not_packed_is_one_document_before_padding():
    one = AttentionPlan(mask="encoder_embedded")

    # With [[0]] upstream's data sets say that nothing is packed.
    assert _stops([5, IMAGE, 5], attention=one, cu_lengths=torch.tensor([[0]])) == (6,)
    assert _stops([5, IMAGE, 5], attention=one, length=5) == (5,)


def test_documents_beyond_the_sequence_are_cut_off():
    ids = torch.tensor([[0, 1, 1, 2]])

    # They end at 1, 6 and 7: the second one ends with the sequence, the third is gone.
    assert _stops([5, IMAGE, 5, 5], document_ids=ids, length=5) == (1, 5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"document_ids": torch.tensor([[1, 1, 0]])},
            r"data: document=0 at position 2 must be >= 1 of the token before it",
        ),
        (
            {"document_ids": torch.tensor([[0, -1, 1]])},
            r"data: document=-1 at position 1 must not come before a document",
        ),
        ({"document_ids": torch.tensor([[0, 0]])}, r"document_ids=\[1, 2\] must be \[1, 3\]"),
        ({}, r"must include 'document_ids' or 'cu_lengths' with mask=multimodal_packed"),
    ],
)
def test_documents_that_contradict_the_batch_are_refused(fields, message):
    with pytest.raises(HostError, match=message):
        _stops([5, 5, 5], **fields)


@pytest.mark.parametrize(
    ("mask", "items", "stops", "message"),
    [
        ("encoder_embedded", [(0, 4), (3, 7)], (8,), "start=3 of an item must be >= 4"),
        ("encoder_prepended", [(1, 5)], (8,), "start=1 of an item must be 0 with"),
        ("multimodal_packed", [(2, 6)], (4, 8), "stop=6 of an item must be <= 4"),
        ("multimodal_packed", [], (5, 3), "document_stop=3 must be > 5"),
        ("encoder_embedded", [], (3, 5), "documents=2 must be 1 with mask=encoder_embedded"),
    ],
)
def test_images_where_the_mask_cannot_have_them_are_refused(mask, items, stops, message):
    runs = tuple(Interval(*item) for item in items)

    with pytest.raises(HostError, match=f"^data: {message}"):
        check_masks([(runs, stops)], attention=AttentionPlan(mask=mask), sequence_length=8)


def test_positions_begin_again_with_every_document():
    image = modality_tokens(2, group=0, document=1)
    mask = SequenceMask.of([text(3), text(1, document=1), image, text(1, document=1), padding(2)])

    np.testing.assert_array_equal(document_positions(mask), [0, 1, 2, 0, 1, 2, 3, 0, 0])


def test_patches_count_along_their_image_and_text_goes_on_behind_its_longer_side():
    image = modality_tokens(6, group=0)
    other = modality_tokens(6, group=0, document=1)
    mask = SequenceMask.of([text(2), image, text(1), other, text(1, document=1), padding(1)])
    sample = SampleSequence((Interval(2, 8), Interval(9, 15)), (9, 16))

    # Images of 2 rows and 3 columns: one at 2 with text at 2 + 3 behind it, the other one first.
    np.testing.assert_array_equal(
        grid_positions(mask, sample, grid=(2, 3)),
        [
            [0, 1, 2, 2, 2, 2, 2, 2, 5, 0, 0, 0, 0, 0, 0, 3, 0],
            [0, 1, 2, 2, 2, 3, 3, 3, 5, 0, 0, 0, 1, 1, 1, 3, 0],
            [0, 1, 2, 3, 4, 2, 3, 4, 5, 0, 1, 2, 0, 1, 2, 3, 0],
        ],
    )


@pytest.mark.parametrize(("documents", "stops"), [("many", (1, 62, 63, 130)), ("one", (57,))])
def test_ends_of_documents_reach_every_rank(documents, stops):
    layout = FactsLayout(sources=(), item_rows={}, sequence_length=130, documents=documents)
    facts = SampleFacts(text_checksum=7, rows={}, document_stops=stops)

    assert layout.facts(layout.row(facts)) == facts


PLAN = """format: 1
world_size: 2
global_batch_size: 16
micro_batch_size: 2
modules:
  vision: {{ranks: 0-1, data_parallel_size: 2}}
  language: {{ranks: 0-1, context_parallel_size: 2, attention: {{mask: {mask}}}}}
edges: [[vision, language]]
schedule: {{kind: colocated}}
"""


@pytest.mark.parametrize(
    ("mask", "damage", "pattern"),
    [
        ("encoder_prepended", "text_first", r"data: start=1 of an item must be 0 with"),
        ("multimodal_packed", "documents_backwards", r"data: document=1 at position 60 must be"),
        ("multimodal_packed", "no_documents", r"data: batch keys=.* must include 'document_ids'"),
    ],
)
def test_batch_that_contradicts_its_mask_stops_every_rank(mask, damage, pattern, tmp_path):
    plan = tmp_path / "plan.yaml"
    plan.write_text(PLAN.format(mask=mask))
    options = ["--mask", mask, "--damaged-batch", damage, "--images", "ragged"]
    options += ["--text-length", "120"]

    outcomes = run_ranks(
        _stop, 2, [str(plan)] * 2, options, "masks_script", init=False, timeout_s=60
    )

    _check(outcomes, pattern)


def test_dropout_under_a_mask_stops_every_rank(tmp_path):
    plan = tmp_path / "plan.yaml"
    plan.write_text(PLAN.format(mask="causal"))
    options = ["--mask", "causal", "--attention-dropout", "0.1"]

    outcomes = run_ranks(
        _stop, 2, [str(plan)] * 2, options, "masks_script", init=False, timeout_s=60
    )

    _check(outcomes, r"modules\.language: attention_dropout=0\.1 must be 0\.0 with attention")
