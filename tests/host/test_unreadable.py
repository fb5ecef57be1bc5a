"""Samples that cannot be read are named, or passed over where that is allowed."""

import re

import pytest
import torch
from torch.utils.data import DataLoader

from megatron_mosaic.errors import HostError
from megatron_mosaic.host.data.unreadable import Allowance, NamedBatches, NamedSamples


def _read(broken):
    def read(request):
        index, items = request if isinstance(request, tuple) else (request, ())
        if index in broken:
            raise OSError(f"shard\nof {index} is torn")
        return torch.tensor([index, *items])

    return read


def _batch(broken, indices, *, limit, workers=0):
    allowance = Allowance(limit, rank=3)
    loader = DataLoader(
        NamedSamples(_read(broken), length=10, tries=allowance.tries),
        batch_sampler=[indices],
        collate_fn=NamedBatches(None),
        num_workers=workers,
    )
    return allowance.take(next(iter(loader)))


@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_sample_is_named_by_its_place(workers):
    # Also out of a loader's process, of which torch would only show a traceback.
    with pytest.raises(
        HostError,
        match=r"^data: sample=7 must be readable on rank 3, not raise OSError 'shard of 7 is torn' "
        r"at .*test_unreadable.py:\d+; repair it, or pass over more than 0 samples",
    ):
        _batch({7}, [6, 7], limit=0, workers=workers)


def test_next_sample_stands_in_the_place_of_one_that_is_passed_over(capsys):
    batch = _batch({7, 8}, [6, 7], limit=2)

    assert batch.tolist() == [[6], [9]]
    said = capsys.readouterr().out
    assert re.findall(r"sample (\d) is passed over on rank 3", said) == ["7", "8"]


def test_first_sample_stands_in_the_place_of_the_last_one():
    assert _batch({9}, [9], limit=1).tolist() == [[0]]


def test_items_of_the_sample_in_place_are_those_that_were_asked_for():
    assert _batch({4}, [(4, (1, 2))], limit=1).tolist() == [[5, 1, 2]]


def test_no_more_samples_are_passed_over_than_allowed():
    with pytest.raises(HostError, match=r"sample=8 must be readable .* more than 1 samples"):
        _batch({7, 8}, [7], limit=1)


def test_same_sample_counts_once_however_often_it_is_read():
    allowance = Allowance(1, rank=0)
    samples = NamedSamples(_read({7}), length=10, tries=allowance.tries)

    for _ in range(3):
        assert allowance.take(NamedBatches(None)([samples[7]])).tolist() == [[8]]


def test_as_many_unreadable_samples_in_a_row_as_are_tried_end_the_run():
    with pytest.raises(HostError, match=r"samples=1-9 must be readable on rank 3.* 'shard of 9 "):
        _batch(set(range(1, 10)), [1], limit=100)
