from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_mosaic.errors import HostError
from megatron_mosaic.host.data.batches import join_samples, take_samples
from megatron_mosaic.layout.ownership import Interval

PER_IMAGE = ("imgs", "num_tiles")


def _batch(images, *, length=3):
    """Sample s has text s, and its images are numbered through the batch."""
    total = sum(images)
    return {
        "tokens": torch.arange(len(images)).unsqueeze(1).expand(-1, length),
        "imgs": torch.arange(total).float().reshape(-1, 1, 1, 1),
        "num_tiles": torch.arange(total),
        "__key__": [f"key{sample}" for sample in range(len(images))],
        "source": "digits",
    }


def _take(batch, start, stop, images):
    return take_samples(batch, Interval(start, stop), images=images, per_image=PER_IMAGE)


def test_samples_of_a_batch_come_with_their_own_images():
    images = (2, 0, 1, 3)
    batch = _take(_batch(images), 1, 3, images)

    assert batch["tokens"][:, 0].tolist() == [1, 2]
    # Sample 0 has images 0 and 1, sample 1 none, sample 2 image 2.
    assert batch["imgs"].flatten().tolist() == [2]
    assert batch["num_tiles"].tolist() == [2]
    assert batch["__key__"] == ["key1", "key2"]
    assert batch["source"] == "digits"


@given(
    images=st.lists(st.integers(0, 3), min_size=1, max_size=6),
    cuts=st.lists(st.integers(0, 6), max_size=4),
)
def test_cut_and_joined_again_a_batch_is_the_same(images, cuts):
    batch = _batch(images)
    bounds = sorted({0, len(images), *(min(cut, len(images)) for cut in cuts)})
    parts = [_take(batch, start, stop, images) for start, stop in pairwise(bounds)]

    joined = join_samples(parts)

    assert joined.keys() == batch.keys()
    assert torch.equal(joined["tokens"], batch["tokens"])
    assert torch.equal(joined["imgs"], batch["imgs"])
    assert torch.equal(joined["num_tiles"], batch["num_tiles"])
    assert joined["__key__"] == batch["__key__"]


def test_texts_of_unlike_lengths_are_filled_up_with_zeros():
    joined = join_samples([_batch((1,), length=2), _batch((1, 1), length=3)])

    assert joined["tokens"].tolist() == [[0, 0, 0], [0, 0, 0], [1, 1, 1]]


def test_placeholder_of_a_batch_without_images_adds_none():
    text_only = _batch((0, 0)) | {"imgs": torch.zeros(1, 1)}

    joined = join_samples([text_only, _batch((1, 0)), text_only])

    assert joined["imgs"].shape == (1, 1, 1, 1)
    assert join_samples([text_only, text_only])["imgs"].shape == (1, 1)
    assert _take(text_only, 0, 1, (0, 0))["imgs"].shape == (1, 1)


def test_dataclass_stays_one():
    @dataclass
    class Texts:
        tokens: torch.Tensor

    batch = take_samples(
        Texts(tokens=torch.tensor([[1], [2], [3]])),
        Interval(1, 3),
        images=(0, 0, 0),
        per_image=PER_IMAGE,
    )

    assert isinstance(batch, Texts)
    assert batch.tokens.tolist() == [[2], [3]]


def test_tensor_without_a_row_for_each_sample_is_refused():
    batch = {"tokens": torch.zeros(2, 3), "mask": torch.zeros(3, 3)}

    with pytest.raises(HostError, match=r"data: mask of shape \[3, 3\] must have 2 rows"):
        _take(batch, 0, 1, (0, 0))


def test_batches_that_hold_unlike_things_are_not_joined():
    with pytest.raises(HostError, match=r"data: batch keys=\['tokens'\] must equal"):
        join_samples([_batch((1,)), {"tokens": torch.zeros(1, 3)}])


def test_batch_without_names_is_refused():
    with pytest.raises(HostError, match="data: batch=Tensor must be a mapping or a dataclass"):
        _take(torch.zeros(2), 0, 1, (0, 0))
