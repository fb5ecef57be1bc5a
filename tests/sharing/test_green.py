from itertools import combinations
from types import SimpleNamespace

import pytest
import torch

from megatron_mosaic.cluster.sm_partition import Granularity
from megatron_mosaic.errors import LayoutError
from megatron_mosaic.sharing.driver import QuotaError
from megatron_mosaic.sharing.green import green_lanes, torch_splits, torch_streams
from megatron_mosaic.sharing.lane import Quota
from tests.sharing.fake_driver import FakeDriver

HOPPER = Granularity(8, 8)
DEVICE = torch.device("cuda", 0)


class FakeContexts:
    """``torch.cuda.GreenContext`` of torch 2.15 on a GPU with 132 SMs."""

    def __init__(self, *, short=0, fails=None):
        self.asked = {}
        self.short, self.fails = short, fails

    def split(self, **asked):
        self.asked = asked
        if self.fails:
            raise RuntimeError(self.fails)
        return tuple(
            SimpleNamespace(
                sm_count=sms - self.short,
                Stream=lambda handle=3000 + i: SimpleNamespace(cuda_stream=handle),
            )
            for i, sms in enumerate(asked["num_sms"])
        )


def quotas(*sms):
    return [Quota(lane=f"lane{lane}", sms=each) for lane, each in enumerate(sms)]


def split(contexts, *sms):
    return torch_streams(quotas(*sms), device=0, num_sms=132, sizes=HOPPER, contexts=contexts)


def test_green_lanes_wrap_disjoint_streams(fake_gpu):
    driver = fake_gpu(FakeDriver())

    lanes = green_lanes(quotas(32, 100, None), device=DEVICE)

    assert lanes.backend == "green"
    assert [lane.sms for lane in lanes.named.values()] == [32, 100, None]
    own = [driver.sms_of(handle) for handle in driver.streams]
    assert [len(each) for each in own] == [32, 100]
    assert not any(one & other for one, other in combinations(own, 2))


def test_green_lanes_run_on_their_own_streams_or_on_the_whole_gpu(fake_gpu):
    driver = fake_gpu(FakeDriver())
    lanes = green_lanes(quotas(32, None), device=DEVICE)
    capped, uncapped = lanes.named.values()
    seen = []

    for lane in (capped, uncapped):
        for whole in (False, True):
            with lane.active(whole=whole):
                seen.append(torch.cuda.current_stream().cuda_stream)

    (green,) = driver.streams
    assert seen[0] == green
    assert green not in seen[1:]
    assert seen[2] == seen[3]


def test_green_lanes_need_no_green_contexts_of_torch(fake_gpu, monkeypatch):
    monkeypatch.delattr(torch.cuda, "GreenContext", raising=False)
    driver = fake_gpu(FakeDriver(version=12080))

    green_lanes(quotas(32, 100), device=DEVICE)

    assert driver.names().count("cuDevSmResourceSplitByCount") == 1


def test_green_lanes_without_quotas_need_no_driver(fake_gpu):
    driver = fake_gpu(FakeDriver(version=None))

    lanes = green_lanes(quotas(None, None), device=DEVICE)

    assert (lanes.backend, [lane.sms for lane in lanes.named.values()]) == ("green", [None, None])
    assert driver.called == []


def test_green_lanes_split_by_torch_where_it_can(fake_gpu, monkeypatch):
    contexts = FakeContexts()
    monkeypatch.setattr(torch.cuda, "GreenContext", contexts, raising=False)
    driver = fake_gpu(FakeDriver(version=13010))
    driver.cuDevSmResourceSplit = object()

    lanes = green_lanes(quotas(32, 100), device=DEVICE)

    assert [lane.sms for lane in lanes.named.values()] == [32, 100]
    assert contexts.asked == {"num_sms": (32, 100), "backfill": (False, True), "device_id": 0}
    assert driver.names() == ["cuDriverGetVersion"] * 2


@pytest.mark.parametrize(
    ("version", "bindings", "contexts", "expected"),
    [
        (13010, True, FakeContexts(), True),
        (13000, True, FakeContexts(), False),  # the driver of the last release before
        (13010, False, FakeContexts(), False),  # cuda-bindings 13.0
        (13010, True, SimpleNamespace(create=None), False),  # torch 2.10-2.14
        (13010, True, None, False),  # torch 2.9
    ],
)
def test_torch_splits_needs_torch_driver_and_bindings(version, bindings, contexts, expected):
    driver = FakeDriver(version=version)
    if bindings:
        driver.cuDevSmResourceSplit = object()

    assert torch_splits(contexts, driver) is expected


def test_torch_split_makes_what_no_groups_make_up_last():
    contexts = FakeContexts()

    streams = split(contexts, 100, 16, None)

    # 132 - 100 - 16 = 16 SMs stay idle, and 100 is no multiple of 8.
    assert contexts.asked["num_sms"] == (16, 100)
    assert contexts.asked["backfill"] == (False, True)
    assert [stream and (stream.handle, stream.sms) for stream in streams] == [
        (3001, 100),
        (3000, 16),
        None,
    ]


def test_torch_split_without_quotas_splits_nothing():
    contexts = FakeContexts()

    assert split(contexts, None, None) == [None, None]
    assert contexts.asked == {}


def test_torch_split_reads_back():
    with pytest.raises(QuotaError, match=r"cuda:0 must give lane lane0 32 SMs, .* gave it 30"):
        split(FakeContexts(short=2), 32, 100)


def test_torch_split_reports_what_cuda_refuses():
    with pytest.raises(
        QuotaError,
        match=r"cuda:0: share\.sms=32 \| 100 must be granted .* GreenContext\.split raised no way;",
    ):
        split(FakeContexts(fails="no\nway"), 32, 100)


def test_torch_split_refuses_quotas_that_the_device_lacks():
    with pytest.raises(LayoutError, match=r"share\.sms=33 must"):
        split(FakeContexts(), 33, None)
