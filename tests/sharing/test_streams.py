import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_mosaic.sharing.lane import Quota
from megatron_mosaic.sharing.streams import StreamLane, priorities, serial_lanes
from tests.sharing.fake_cuda import FakeCuda, FakeTensor

QUOTAS = [Quota(lane="vision", sms=32), Quota(lane="language")]


def lane_of(cuda, name, *, capped=True):
    stream = cuda.stream(name)
    whole = cuda.stream(f"{name} on the whole GPU") if capped else None
    return StreamLane(name, stream=stream, whole=whole, sms=32, activate=cuda.activate)


@given(st.lists(st.booleans(), min_size=1, max_size=20))
def test_stream_lane_runs_in_order_whichever_stream_it_is_on(wholes):
    cuda = FakeCuda()
    lane = lane_of(cuda, "vision")

    for whole in wholes:
        with lane.active(whole=whole):
            assert cuda.launch("activations") is None


def test_stream_lane_runs_on_the_stream_asked_for():
    cuda = FakeCuda()
    lane = lane_of(cuda, "vision")
    seen = []

    for whole in (False, True, False):
        with lane.active(whole=whole):
            seen.append(cuda.current.name)

    assert seen == ["vision", "vision on the whole GPU", "vision"]
    assert cuda.current.name == "main"


def test_stream_lane_runs_in_order_inside_itself():
    cuda = FakeCuda()
    lane = lane_of(cuda, "vision")

    with lane.active():
        assert cuda.launch("activations") is None
        with lane.active(whole=True):
            assert cuda.launch("activations") is None
        assert cuda.current.name == "vision"
        assert cuda.launch("activations") is None


def test_stream_lane_runs_in_order_after_work_that_failed():
    cuda = FakeCuda()
    lane = lane_of(cuda, "vision")

    def fail():
        with lane.active(whole=True):
            cuda.launch("activations")
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        fail()

    assert cuda.current.name == "main"
    with lane.active():
        assert cuda.launch("activations") is None


def test_stream_lane_without_quota_has_one_stream():
    cuda = FakeCuda()
    lane = lane_of(cuda, "language", capped=False)

    with lane.active(whole=True):
        assert cuda.current.name == "language"


def test_two_streams_race_without_a_lane():
    cuda = FakeCuda()
    one, other = cuda.stream("vision"), cuda.stream("vision on the whole GPU")

    with cuda.activate(one):
        cuda.launch("activations")
    with cuda.activate(other):
        assert cuda.launch("activations") is not None


@pytest.mark.parametrize("source_whole", [False, True])
@pytest.mark.parametrize("goes_over", [False, True])
def test_event_orders_lanes_also_where_they_go_over_to_the_whole_gpu(source_whole, goes_over):
    cuda = FakeCuda()
    vision, language = lane_of(cuda, "vision"), lane_of(cuda, "language")

    with vision.active(whole=source_whole):
        cuda.launch("rows")
    language.wait(vision.record())
    with language.active(whole=goes_over):
        assert cuda.launch("rows") is None


def test_lanes_race_without_an_event():
    cuda = FakeCuda()
    vision, language = lane_of(cuda, "vision"), lane_of(cuda, "language")

    with vision.active():
        cuda.launch("rows")
    with language.active():
        assert str(cuda.launch("rows")) == "lane language uses rows without waiting for lane vision"


def test_event_covers_what_was_launched_before_the_lane_went_over():
    cuda = FakeCuda()
    vision, language = lane_of(cuda, "vision"), lane_of(cuda, "language")

    with vision.active():
        cuda.launch("rows")
    with vision.active(whole=True):
        cuda.launch("more rows")
    language.wait(vision.record())

    with language.active():
        assert cuda.launch("rows") is None
        assert cuda.launch("more rows") is None


def test_hold_keeps_memory_on_both_streams_of_a_lane():
    cuda, tensor = FakeCuda(), FakeTensor()
    lane = lane_of(cuda, "vision")

    lane.hold(tensor)

    assert [stream.name for stream in tensor.held] == ["vision", "vision on the whole GPU"]


def test_hold_keeps_memory_once_on_a_lane_without_quota():
    cuda, tensor = FakeCuda(), FakeTensor()

    lane_of(cuda, "language", capped=False).hold(tensor)

    assert [stream.name for stream in tensor.held] == ["language"]


def test_serial_lanes_do_nothing():
    lanes = serial_lanes(QUOTAS)
    tensor = torch.ones(2)

    assert (lanes.backend, list(lanes.named)) == (
        "serial",
        ["vision", "language"],
    )
    for lane in (lanes.main, *lanes.named.values()):
        lane.wait(lane.record())
        lane.hold(tensor)
        with lane.active(whole=True):
            assert torch.equal(tensor + 1, torch.full((2,), 2.0))
        assert lane.sms is None


@pytest.mark.parametrize(
    ("quotas", "expected"),
    [
        # The whole GPU before 64 SMs before 32; the last have torch's default of 0.
        ([32, None, 64], (0, -2, -1)),
        ([32, 32, 68], (0, 0, -1)),
        ([None, None], (0, 0)),
    ],
)
def test_priorities_follow_quotas(quotas, expected):
    lanes = [Quota(lane=str(lane), sms=sms) for lane, sms in enumerate(quotas)]

    assert priorities(lanes) == expected


def test_priorities_that_are_asked_for_come_first():
    lanes = [Quota(lane="vision", sms=32, priority=-1), Quota(lane="language")]

    assert priorities(lanes) == (-1, 0)
