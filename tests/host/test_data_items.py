"""Encoder items that are dealt by cost: each rank reads its own, a step after their facts."""

import multiprocessing
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from megatron_mosaic.layout.plan import Plan
from tests.host.hosted import hosted_modules
from tests.ranks import run_ranks

# Rank 0 has vision alone, ranks 1 and 2 both modules. A task of vision is all eight samples.
PLAN = """
format: 1
world_size: 3
global_batch_size: 8
micro_batch_size: 2
modules:
  vision: {ranks: 0-2, data_parallel_size: 3, items: balanced}
  language: {ranks: 1-2, data_parallel_size: 2}
edges: [[vision, language]]
schedule: {kind: colocated}
"""
IMAGES = (3, 0, 1, 0, 0, 2, 0, 0)  # of the samples of every step
IMAGE = -200


class _Samples(torch.utils.data.Dataset):
    """Image k of sample i has the value 10 i + k; remembers which were decoded."""

    def __init__(self, length=20, broken=None, offset=0):
        self.read, self.decoded = [], []
        self._length, self._broken, self._offset = length, broken, offset

    def __len__(self):
        return self._length

    def __getitem__(self, index):
        return self._sample(index, range(IMAGES[index % 8]))

    def _sample(self, index, items):
        if index == self._broken and dist.get_rank() == 0:
            raise OSError("shard\nis torn")
        self.read.append(index)
        images = [10 * index + item for item in items]
        self.decoded += images
        text = [index + self._offset, *[IMAGE] * IMAGES[index % 8]]
        return {
            "tokens": torch.tensor(text + [0] * (4 - len(text))),
            "image": torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 1, 1),
        }

    @staticmethod
    def collate_fn(samples):
        return {
            "tokens": torch.stack([sample["tokens"] for sample in samples]),
            "image": torch.cat([sample["image"] for sample in samples]),
        }


class _SamplesByItem(_Samples):
    def read_items(self, index, items):
        return self._sample(index, items)


class _OneItemTooFew(_SamplesByItem):
    def read_items(self, index, items):
        return self._sample(index, items[1:])


def _boundary():
    """The translator of a vision half whose images have one row each."""
    from megatron_mosaic.host.families.llava import LlavaBoundary

    config = SimpleNamespace(
        num_layers=1,
        hidden_size=8,
        ffn_hidden_size=32,
        num_attention_heads=2,
        num_query_groups=2,
        kv_channels=4,
        gated_linear_unit=False,
    )
    model = SimpleNamespace(
        img_seq_len=1,
        image_token_index=IMAGE,
        config=config,
        vision_projection=None,
        vision_model=SimpleNamespace(config=config),
    )
    return LlavaBoundary(model, "vision")


def _loader_source(dataset, shares, boundaries, first_sample):
    """Loaders of two language replicas, of two samples a microbatch each."""
    from megatron_mosaic.host.data.loaders import LoaderSource

    def microbatches(replica):
        for first in range(first_sample + 2 * replica, len(dataset) - 1, 4):
            yield dataset.collate_fn([dataset[first], dataset[first + 1]])

    loaders = {replica: microbatches(replica) for replica in shares.replicas_read()}
    return LoaderSource(loaders, shares=shares, boundaries=boundaries)


def _reader(
    rank, dataset, *, first_sample=0, num_workers=0, hands_ahead=False, loaders=False, plan=PLAN
):
    from functools import partial

    from megatron_mosaic.host.cpu import run_on_cpu

    run_on_cpu()
    from megatron_mosaic.host.data.facts import FactsLayout
    from megatron_mosaic.host.data.items import deal_step, item_deals
    from megatron_mosaic.host.data.reader import StepReader
    from megatron_mosaic.host.data.samples import SampleSource
    from megatron_mosaic.host.data.shares import step_shares
    from megatron_mosaic.host.data.unreadable import Allowance
    from megatron_mosaic.schedule.build import build_schedule

    plan = Plan.loads(plan, "plan")
    hosted = hosted_modules(plan, rank)
    schedule = build_schedule(plan)
    shares = step_shares(schedule, hosted, language=plan.language, samples_per_replica=2)
    boundaries = {name: _boundary() for name in hosted}
    if loaders:
        source = _loader_source(dataset, shares, boundaries, first_sample)
    else:
        source = SampleSource(
            dataset,
            shares=shares,
            boundaries=boundaries,
            first_sample=first_sample,
            num_workers=num_workers,
            allowance=Allowance(0, rank=rank),
        )
    deals = item_deals(plan, schedule, {"vision": _boundary().item_cost()})
    return StepReader(
        source,
        first_sample=first_sample,
        num_samples=shares.num_samples,
        layout=FactsLayout(sources=("vision",), item_rows={}, sequence_length=4),
        group=dist.group.WORLD,
        hands_ahead=hands_ahead,
        deal=partial(deal_step, deals, microbatch_size=shares.microbatch_size),
    )


def _images(batch):
    return None if batch is None else batch["image"].flatten().int().tolist()


def _read_all(rank, kind, options):
    # As torchrun's ranks start their loader processes; those of this pool would import torch anew.
    multiprocessing.set_start_method("fork", force=True)
    dataset = {"whole": _Samples, "by item": _SamplesByItem}[kind]()
    steps = list(_reader(rank, dataset, **options))
    images = [[_images(batch) for batch in step.batches["vision"].values()] for step in steps]
    samples = [
        batch["tokens"][:, 0].tolist()
        for step in steps
        for batch in step.batches["vision"].values()
    ]
    return images, samples, dataset.decoded, [step.owners for step in steps]


# Six images of one cost for three replicas, dealt by turns: 0 1 2 | 0 | 1 2.
OWN_IMAGES = [[0, 20], [1, 50], [2, 51]]
OWN_SAMPLES = [[0, 2], [0, 5], [0, 5]]


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("whole", {}),
        ("by item", {}),
        ("whole", {"loaders": True}),
        ("by item", {"hands_ahead": True}),
        ("by item", {"num_workers": 1}),
    ],
    ids=["whole_samples", "by_item", "loaders", "a_step_ahead", "loader_processes"],
)
def test_every_rank_reads_the_items_that_are_dealt_to_it(kind, options):
    for rank, (images, samples, _, owners) in enumerate(run_ranks(_read_all, 3, kind, options)):
        first, second = OWN_IMAGES[rank], [80 + image for image in OWN_IMAGES[rank]]
        assert images == [[first], [second]]
        assert samples == [OWN_SAMPLES[rank], [8 + sample for sample in OWN_SAMPLES[rank]]]
        dealt = ((0, 1, 2), (), (0,), (), (), (1, 2), (), ())
        assert owners == [{"vision": {(0, 1): dealt}}] * 2


def test_data_set_that_reads_items_decodes_no_others():
    # Rank 0 has no other module: it decodes its two images of each of two steps.
    outcomes = run_ranks(_read_all, 3, "by item", {})
    assert outcomes[0][2] == [0, 20, 80, 100]

    # Without, samples 0 and 2, with the three images of the first.
    outcomes = run_ranks(_read_all, 3, "whole", {})
    assert outcomes[0][2] == [0, 1, 2, 20, 80, 81, 82, 100]


def _events(rank):
    from megatron_mosaic.comm.record import record

    dataset, seen = _SamplesByItem(length=24), []
    with record() as log:
        for _ in _reader(rank, dataset):
            seen.append(max(dataset.read))
            log.append("tasks")
    return seen, [entry if entry == "tasks" else type(entry).__name__ for entry in log]


def test_facts_of_a_step_are_known_before_the_tasks_of_the_step_before_it():
    exchange = agree = ("Issue", "Wait")
    outcomes = run_ranks(_events, 3)
    for _, events in outcomes:
        # Facts of the first step, its items, facts of the second, those of the third under way.
        first = [*exchange, *agree, *exchange, "Issue", "tasks"]
        assert events[: len(first)] == first
        # The second step's items, for which nothing but that is waited; facts of the third.
        assert events[len(first) :][:5] == [*agree, "Wait", "Issue", "tasks"]
    # Language reads two steps ahead, of 8 samples each; vision alone, without loader processes,
    # what it is about to run.
    assert outcomes[0][0] == [2, 10, 18]
    assert outcomes[1][0] == [21, 21, 21]


def _read_broken(rank, kind, broken, offsets):
    from megatron_mosaic.errors import HostError

    kinds = {"whole": _Samples, "too few": _OneItemTooFew}
    dataset = kinds[kind](length=24, broken=broken, offset=offsets[rank])
    steps = []
    try:
        for step in _reader(rank, dataset):
            steps.append(step.first_sample)
    except HostError as error:
        return steps, getattr(error, "speaker", None), str(error)
    return steps, None, None


@pytest.mark.parametrize(
    ("kind", "broken", "offsets", "read", "message"),
    [
        # Sample 8 is the first of the second step; rank 0 has an image of it.
        ("whole", 8, (0, 0, 0), [0], "OSError 'shard is torn' at "),
        ("whole", None, (1, 0, 0), [], "text_checksum="),
        ("too few", None, (0, 0, 0), [], "data: images=0 must equal the image tokens=4"),
    ],
    ids=["torn", "another_sample", "too_few"],
)
def test_items_that_one_rank_cannot_read_stop_all_before_their_step(
    kind, broken, offsets, read, message
):
    outcomes = run_ranks(_read_broken, 3, kind, broken, offsets)

    assert [outcome[:2] for outcome in outcomes] == [(read, 0)] * 3
    assert message in outcomes[0][2]


def _with_the_next(rank, broken, length):
    from megatron_mosaic.errors import HostError

    dataset = _Samples(length, broken=broken)
    steps = []
    try:
        for step in _reader(rank, dataset, hands_ahead=True):
            ahead = step.ahead
            steps.append((step.first_sample, ahead and ahead.first_sample))
            assert ahead is None or _images(ahead.batches["vision"][0, 1])
    except HostError:
        return [*steps, "failed"]
    return steps


@pytest.mark.parametrize(
    ("broken", "length", "end"),
    [(None, 20, []), (16, 24, ["failed"])],
    ids=["ends", "breaks"],
)
def test_step_is_handed_out_with_the_items_of_the_next_if_every_rank_has_them(broken, length, end):
    outcomes = run_ranks(_with_the_next, 3, broken, length)

    assert outcomes == [[(0, 8), (8, None), *end]] * 3


def _resumed(rank):
    reader = _reader(rank, _SamplesByItem(24))
    next(reader)
    step = next(_reader(rank, _SamplesByItem(24), first_sample=8))
    return _images(step.batches["vision"][0, 1])


def test_resumed_reader_deals_the_same_items():
    assert run_ranks(_resumed, 3) == [[80, 100], [81, 130], [82, 131]]
