import sys
from inspect import signature
from itertools import combinations, islice

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_mosaic.cluster.sm_partition import Granularity, granularity, partitions
from megatron_mosaic.errors import LayoutError
from megatron_mosaic.sharing.driver import QuotaError, green_streams, load_driver
from megatron_mosaic.sharing.lane import Quota
from tests.sharing import fake_driver
from tests.sharing.fake_driver import FUNCTIONS, CUresult, FakeDriver

HOPPER = Granularity(8, 8)


def quotas(*sms):
    return [Quota(lane=f"lane{lane}", sms=each) for lane, each in enumerate(sms)]


def streams_of(driver, *sms):
    return green_streams(quotas(*sms), device=0, sizes=HOPPER, driver=driver)


def test_green_streams_call_the_driver_in_order():
    driver = FakeDriver()

    streams_of(driver, 32, 100)

    one_lane = [
        "cuDevResourceGenerateDesc",
        "cuGreenCtxCreate",
        "cuGreenCtxStreamCreate",
        "cuGreenCtxGetDevResource",
        "cuStreamGetGreenCtx",
    ]
    assert driver.names() == [
        "cuInit",
        "cuDeviceGet",
        "cuDeviceGetDevResource",
        "cuDevSmResourceSplitByCount",
        *one_lane,
        *one_lane,
    ]


@pytest.mark.parametrize(
    ("sms", "asked"),
    [
        ((32, 100), (1, 32)),
        ((100, 32), (1, 32)),
        ((32, None), (1, 32)),
        ((32, 32, 68), (2, 32)),
        ((8, 16, 32, 76), (7, 8)),
        ((16, 28, None), (13, 8)),
    ],
)
def test_green_streams_of_one_split_have_disjoint_sms_of_the_right_number(sms, asked):
    driver = FakeDriver()

    streams = streams_of(driver, *sms)

    splits = [call for call in driver.called if call[0] == "cuDevSmResourceSplitByCount"]
    assert [(groups, least) for _, groups, _, _, least in splits] == [asked]
    green = [stream for stream in streams if stream is not None]
    assert [stream and stream.sms for stream in streams] == list(sms)
    own = [driver.sms_of(stream.handle) for stream in green]
    assert [len(each) for each in own] == [each for each in sms if each]
    assert not any(one & other for one, other in combinations(own, 2))


def test_green_streams_of_two_splits_would_share_sms():
    driver = FakeDriver()

    (one,) = streams_of(driver, 64)
    (other,) = streams_of(driver, 64)

    assert driver.sms_of(one.handle) == driver.sms_of(other.handle)


def test_green_streams_without_quotas_split_nothing():
    driver = FakeDriver()

    assert streams_of(driver, None, None) == [None, None]
    assert "cuDevSmResourceSplitByCount" not in driver.names()


def test_green_streams_take_priorities():
    driver = FakeDriver()

    green_streams(
        [Quota(lane="vision", sms=32, priority=1), Quota(lane="language", sms=100)],
        device=0,
        sizes=HOPPER,
        driver=driver,
    )

    created = [call for call in driver.called if call[0] == "cuGreenCtxStreamCreate"]
    assert [priority for *_, priority in created] == [0, -1]


def test_green_streams_take_granularity_where_the_driver_has_none():
    # Drivers before CUDA 13 do not say; an A100 has groups of >= 4 in multiples of 2.
    driver = FakeDriver(num_sms=108, least=0, multiple=0)

    streams = green_streams(quotas(10, 98), device=0, sizes=Granularity(4, 2), driver=driver)

    assert [stream.sms for stream in streams] == [10, 98]


@given(
    # V100, A100, L40S, H100 PCIe, H200, B200, RTX 5090.
    st.sampled_from([(80, 7), (108, 8), (142, 8), (114, 9), (132, 9), (148, 10), (170, 12)]),
    st.integers(2, 4),
    st.data(),
)
def test_green_streams_of_every_partition_are_disjoint(device, num_lanes, data):
    num_sms, major = device
    sizes = granularity((major, 0))
    deals = partitions(num_sms, compute_capability=(major, 0), num_lanes=num_lanes)
    some = list(islice(deals, 0, None, 101 if num_lanes > 2 else 1))
    deal = data.draw(st.permutations(data.draw(st.sampled_from(some))))
    driver = FakeDriver(num_sms=num_sms, least=sizes.least, multiple=sizes.multiple)

    streams = green_streams(quotas(*deal), device=0, sizes=sizes, driver=driver)

    own = [driver.sms_of(stream.handle) for stream in streams]
    assert [len(each) for each in own] == list(deal)
    assert len(frozenset().union(*own)) == num_sms
    assert driver.names().count("cuDevSmResourceSplitByCount") == 1


def test_green_streams_report_groups_that_clusters_do_not_allow():
    driver = FakeDriver(max_groups=3)

    with pytest.raises(
        QuotaError,
        match=r"cuda:0: share\.sms=24 \| 16 \| - must be 5 groups of 8 SMs.*"
        r"give 8 \| 8 \| 8 and 108 over",
    ):
        streams_of(driver, 24, 16, None)

    assert "cuGreenCtxCreate" not in driver.names()


def test_green_streams_read_back_what_a_context_has():
    driver = FakeDriver(short=6)

    with pytest.raises(QuotaError, match=r"must give lane lane0 32 SMs, .* gave it 26; use 26 or"):
        streams_of(driver, 32, 100)

    assert not driver.contexts
    assert not driver.streams


def test_green_streams_read_back_the_context_of_a_stream():
    driver = FakeDriver()
    driver._cuStreamGetGreenCtx = lambda stream: (0,)

    with pytest.raises(QuotaError, match=r"stream of lane lane0, .* made it outside its context"):
        streams_of(driver, 32, 100)

    assert not driver.contexts


def test_green_streams_refuse_quotas_that_the_device_lacks_before_any_split():
    driver = FakeDriver()

    with pytest.raises(LayoutError, match=r"cuda:0: share\.sms=33 must .*; use 32 or 36"):
        streams_of(driver, 33, None)

    assert "cuDevSmResourceSplitByCount" not in driver.names()


@pytest.mark.parametrize("code", [code for code in CUresult if code])
@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("cuInit", 1),
        ("cuDeviceGet", 1),
        ("cuDeviceGetDevResource", 1),
        ("cuDevSmResourceSplitByCount", 1),
        ("cuDevResourceGenerateDesc", 1),
        ("cuDevResourceGenerateDesc", 2),
        ("cuGreenCtxCreate", 1),
        ("cuGreenCtxCreate", 2),
        ("cuGreenCtxStreamCreate", 1),
        ("cuGreenCtxStreamCreate", 2),
        ("cuGreenCtxGetDevResource", 2),
        ("cuStreamGetGreenCtx", 2),
    ],
)
def test_green_streams_leave_nothing_behind_when_the_driver_fails(name, call, code):
    driver = FakeDriver(fails={(name, call): code})

    with pytest.raises(
        QuotaError,
        match=rf"cuda:0: share\.sms=32 \| 100 must .*{name} returned {code.name} \({code:d}\); .*",
    ) as raised:
        streams_of(driver, 32, 100)

    assert raised.value.code == code
    assert not driver.contexts
    assert not driver.streams


@pytest.mark.parametrize(
    ("code", "remedy"),
    [
        (801, "has no green contexts; use --mosaic-sharing priority"),
        (914, "has no SMs to split"),
        (915, "choose quotas of which the driver can make groups"),
        (1, r"\(1\); use --mosaic-sharing priority"),
    ],
)
def test_green_streams_say_what_to_do(code, remedy):
    driver = FakeDriver(fails={("cuGreenCtxCreate", 1): code})

    with pytest.raises(QuotaError, match=remedy):
        streams_of(driver, 32, 100)


@pytest.mark.parametrize("name", ["cuGreenCtxStreamCreate", "cuDevSmResourceSplitByCount"])
def test_green_streams_need_functions_that_old_bindings_lack(name):
    driver = FakeDriver(missing=(name,))

    with pytest.raises(QuotaError, match=f"must find {name} in cuda-bindings; update the package"):
        streams_of(driver, 32, 100)

    assert not driver.contexts


def test_load_driver_needs_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", None)

    with pytest.raises(QuotaError, match="package cuda-bindings must be installed"):
        load_driver()


def test_load_driver_needs_a_driver(monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", FakeDriver(version=None))

    with pytest.raises(QuotaError, match=r"in the CUDA driver \(the CUDA driver is not there\)"):
        load_driver()


def test_load_driver_needs_streams_of_green_contexts(monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", FakeDriver(version=12040))

    with pytest.raises(QuotaError, match=r"driver: CUDA 12\.4 must be >= 12\.5 .*; update"):
        load_driver()


def test_load_driver_returns_the_bindings(monkeypatch):
    driver = FakeDriver(version=12050)
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", driver)

    assert load_driver() is driver


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a driver")
def test_load_driver_finds_none_on_a_machine_without_gpu():
    pytest.importorskip("cuda.bindings.driver", reason="cuda-bindings is not installed")

    with pytest.raises(QuotaError, match="driver must find cuDriverGetVersion in the CUDA driver"):
        load_driver()


def test_fake_driver_has_the_signatures_and_numbers_of_the_real_one():
    real = pytest.importorskip("cuda.bindings.driver", reason="cuda-bindings is not installed")
    fake = FakeDriver()

    for name in FUNCTIONS:
        ours, theirs = getattr(fake, f"_{name}"), getattr(real, name)
        assert len(signature(ours).parameters) == len(signature(theirs).parameters), name
    for enum in fake_driver.ENUMS:
        theirs = getattr(real, enum.__name__)
        assert {each.name: each.value for each in enum} == {
            each.name: getattr(theirs, each.name).value for each in enum
        }
