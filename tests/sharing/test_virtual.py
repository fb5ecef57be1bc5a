import pytest
import torch

from megatron_mosaic.layout.plan import Plan
from megatron_mosaic.schedule.build import build_schedule
from megatron_mosaic.schedule.lanes import joins, lane_steps
from megatron_mosaic.schedule.races import accesses
from megatron_mosaic.schedule.steps import steps_of
from megatron_mosaic.sharing.lane import Quota
from megatron_mosaic.sharing.virtual import virtual_lanes

PLAN = """format: 1
world_size: 1
global_batch_size: 4
micro_batch_size: 1
modules:
  vision: {ranks: 0, share: {sms: 32}}
  audio: {ranks: 0}
  language: {ranks: 0}
edges: [[vision, language], [audio, language]]
schedule: {kind: concurrent, encoder_group: 2}
"""


@pytest.fixture
def plan(tmp_path):
    path = tmp_path / "plan.yaml"
    path.write_text(PLAN)
    return Plan.load(path)


def walk(plan, *, without=None):
    """Runs a rank's events and accesses on lanes, as the engine does; returns the first race.

    Args:
        plan: The plan.
        without: Number of the wait that is left out.
    """
    lanes = virtual_lanes([Quota(lane=name) for name in plan.modules])
    clocks, numbers = lanes.races, iter(range(1000))
    assert clocks is not None

    def wait(lane, event):
        if next(numbers) != without:
            lane.wait(event)

    steps = lane_steps(plan, steps_of(plan, build_schedule(plan), 0), 0)
    used = accesses(plan, [step.step for step in steps])
    every = {access.what for own in used for access in own}
    joined = joins(steps)
    races = [clocks.access(lanes.main.name, what, writes=True) for what in every]
    begin = lanes.main.record()
    for name in joined.begin:
        wait(lanes.named[name], begin)
    events = {}
    for position, (step, own) in enumerate(zip(steps, used, strict=True)):
        lane = lanes.named[step.lane]
        for before in step.after:
            wait(lane, events[before])
        with lane.active(whole=step.whole):
            races += [clocks.access(step.lane, what, writes=writes) for what, writes in own]
        events[position] = lane.record()
    for name in joined.end:
        wait(lanes.main, lanes.named[name].record())
    races += [clocks.access(lanes.main.name, what, writes=True) for what in every]
    return next((race for race in races if race), None), next(numbers)


def test_virtual_lanes_pass_a_schedule_with_three_modules(plan):
    race, num_waits = walk(plan)

    assert race is None
    assert num_waits > 3


def test_virtual_lanes_find_each_wait_that_is_left_out(plan):
    _, num_waits = walk(plan)

    passed = [number for number in range(num_waits) if walk(plan, without=number)[0] is None]

    assert passed == []


def test_virtual_lanes_have_their_quotas_and_change_no_work():
    lanes = virtual_lanes([Quota(lane="vision", sms=32), Quota(lane="language")])
    vision = lanes.named["vision"]

    assert lanes.backend == "virtual"
    assert (vision.name, vision.sms, lanes.named["language"].sms) == ("vision", 32, None)
    with vision.active(whole=True):
        tensor = torch.ones(2)
    vision.hold(tensor)
    assert torch.equal(tensor, torch.ones(2))


class Clock:
    """A host's clock that only work moves."""

    now_s = 0.0

    def __call__(self):
        return self.now_s

    def work(self, lane, duration_s):
        with lane.active():
            self.now_s += duration_s


def test_virtual_lanes_take_turns_and_time_what_would_run_at_once():
    clock = Clock()
    lanes = virtual_lanes([Quota(lane="vision"), Quota(lane="language")], now=clock)
    vision, language = lanes.named.values()

    # vision   | v0 2 s | v1 2 s | v2 2 s |
    # language          | l0 3 s    | l1 3 s    | l2 3 s    |
    for _ in range(3):
        clock.work(vision, 2.0)
        language.wait(vision.record())
        clock.work(language, 3.0)
    for lane in (vision, language):
        lanes.main.wait(lane.record())

    assert clock.now_s == 15.0
    assert (vision.time_s, language.time_s, lanes.main.time_s) == (6.0, 11.0, 11.0)


def test_virtual_lane_counts_time_inside_itself_once():
    clock = Clock()
    (lane,) = virtual_lanes([Quota(lane="vision")], now=clock).named.values()

    with lane.active():
        clock.work(lane, 2.0)

    assert lane.time_s == 2.0
