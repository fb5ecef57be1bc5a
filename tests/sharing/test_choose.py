from functools import partial

import pytest
import torch

from megatron_mosaic.errors import HostError, LayoutError
from megatron_mosaic.sharing.choose import MODES, open_lanes
from megatron_mosaic.sharing.driver import QuotaError
from megatron_mosaic.sharing.guards import Environment
from megatron_mosaic.sharing.lane import Quota
from tests.sharing.fake_driver import FakeDriver

GPU = torch.device("cuda", 0)
HOST = torch.device("cpu")
QUOTAS = (Quota(lane="vision", sms=32), Quota(lane="language"))


def lanes_of(mode, *, device=GPU, quotas=QUOTAS, **facts):
    return open_lanes(quotas, mode=mode, device=device, environment=Environment(**facts))


@pytest.mark.parametrize(
    ("mode", "backend", "note"),
    [
        ("auto", "green", "lanes: green contexts: vision on 32 SMs, language on all SMs"),
        ("strict", "green", "lanes: green contexts: vision on 32 SMs, language on all SMs"),
        ("green", "green", "lanes: green contexts: vision on 32 SMs, language on all SMs"),
        ("priority", "priority", "lanes: streams with priorities, no SM quotas"),
        ("streams", "streams", "lanes: streams, no SM quotas"),
        ("serial", "serial", "lanes: none, modules run one after the other"),
    ],
)
def test_open_lanes_takes_the_mode_on_a_gpu(fake_gpu, mode, backend, note):
    fake_gpu(FakeDriver())

    lanes = lanes_of(mode)

    assert (lanes.backend, lanes.note, lanes.races) == (backend, note, None)
    assert list(lanes.named) == ["vision", "language"]


VIRTUAL = "lanes: virtual, on a host, checked for races: vision on 32 SMs, language on all SMs"


@pytest.mark.parametrize(
    ("mode", "backend", "note"),
    [
        ("auto", "virtual", VIRTUAL),
        ("strict", "virtual", VIRTUAL),
        ("green", "virtual", VIRTUAL),
        ("serial", "serial", "lanes: none, modules run one after the other"),
    ],
)
def test_open_lanes_takes_the_mode_on_a_host(mode, backend, note):
    lanes = lanes_of(mode, device=HOST)

    assert (lanes.backend, lanes.note) == (backend, note)
    assert (lanes.races is not None) == (backend == "virtual")


@pytest.mark.parametrize("mode", ["priority", "streams"])
def test_open_lanes_has_no_streams_on_a_host(mode):
    with pytest.raises(HostError, match=f"mosaic_sharing={mode} must have a GPU, not cpu; use"):
        lanes_of(mode, device=HOST)


OTHER_QUOTA = (Quota(lane="vision", sms=33), Quota(lane="language"))
NEW_BINDINGS = "in cuda-bindings; update the package"
# The driver, or none for its bindings; quotas; the error, and what it says.
TROUBLE = {
    "no driver": (partial(FakeDriver, version=None), QUOTAS, QuotaError, "in the CUDA driver"),
    "no bindings": (lambda: None, QUOTAS, QuotaError, "package cuda-bindings must be installed"),
    "old driver": (
        partial(FakeDriver, version=12040),
        QUOTAS,
        QuotaError,
        r"CUDA 12\.4 must be >= 12\.5",
    ),
    "old bindings": (
        partial(FakeDriver, missing=("cuGreenCtxStreamCreate",)),
        QUOTAS,
        QuotaError,
        f"cuGreenCtxStreamCreate {NEW_BINDINGS}",
    ),
    "no green contexts": (
        partial(FakeDriver, fails={("cuGreenCtxCreate", 1): 801}),
        QUOTAS,
        QuotaError,
        r"CUDA_ERROR_NOT_SUPPORTED \(801\)",
    ),
    "other SMs than asked for": (
        partial(FakeDriver, short=2),
        QUOTAS,
        QuotaError,
        "the device gave it 30",
    ),
    "fewer groups": (partial(FakeDriver, max_groups=0), QUOTAS, QuotaError, "1 groups of 32 SMs"),
    "quota of another device": (
        partial(FakeDriver),
        OTHER_QUOTA,
        LayoutError,
        r"share\.sms=33 must",
    ),
}


@pytest.mark.parametrize("mode", ["strict", "green"])
@pytest.mark.parametrize("case", TROUBLE)
def test_open_lanes_stops_where_quotas_cannot_be_had(fake_gpu, case, mode):
    driver, quotas, error, message = TROUBLE[case]
    fake_gpu(driver())

    with pytest.raises(error, match=message) as raised:
        lanes_of(mode, quotas=quotas)

    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("case", TROUBLE)
def test_open_lanes_falls_back_to_priorities_and_says_why(fake_gpu, case):
    driver, quotas, _, _ = TROUBLE[case]
    fake_gpu(driver())

    lanes = lanes_of("auto", quotas=quotas)

    assert lanes.backend == "priority"
    assert lanes.note.startswith("lanes: streams with priorities, no SM quotas (")
    assert "\n" not in lanes.note


def test_open_lanes_has_none_without_quotas_and_priorities(fake_gpu):
    fake_gpu(FakeDriver(version=12040), priority_range=(0, 0))

    lanes = lanes_of("auto")

    assert lanes.backend == "serial"
    assert "CUDA 12.4 must be >= 12.5" in lanes.note
    assert "stream priorities 0..0 must differ" in lanes.note


def test_open_lanes_stops_without_priorities(fake_gpu):
    fake_gpu(FakeDriver(), priority_range=(0, 0))

    with pytest.raises(HostError, match=r"cuda:0: stream priorities 0\.\.0 must differ"):
        lanes_of("priority")


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode not in ("auto", "serial")])
def test_open_lanes_stops_where_a_guard_objects(fake_gpu, mode):
    fake_gpu(FakeDriver())

    with pytest.raises(HostError, match=r"CUDA_DEVICE_MAX_CONNECTIONS=1 must be > 1"):
        lanes_of(mode, compute_capability=(9, 0), device_max_connections="1")


def test_open_lanes_stops_on_a_host_where_a_guard_objects():
    with pytest.raises(HostError, match="fp8 must be off"):
        lanes_of("strict", device=HOST, fp8=True)


@pytest.mark.parametrize("device", [GPU, HOST])
def test_open_lanes_has_none_where_a_guard_objects(fake_gpu, device):
    driver = fake_gpu(FakeDriver())

    lanes = lanes_of("auto", device=device, fp8=True)

    assert lanes.backend == "serial"
    assert lanes.note.startswith("lanes: none, modules run one after the other (arguments: fp8")
    assert driver.called == []


def test_open_lanes_asks_no_guard_where_modules_run_one_after_the_other(fake_gpu):
    fake_gpu(FakeDriver())

    assert lanes_of("serial", fp8=True).backend == "serial"
