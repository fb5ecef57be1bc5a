"""Lanes of the engine on real ranks: what each event is for, and what no order can change."""

from collections import Counter
from dataclasses import replace

from benchmarks.timed_plans import TimedPlan
from benchmarks.timed_run import TimedEngine
from megatron_mosaic.engine.lanes import LaneWalk
from megatron_mosaic.layout.plan import Plan
from megatron_mosaic.schedule.graph import stage_order
from megatron_mosaic.schedule.lanes import Joins, lanes_of
from megatron_mosaic.schedule.simulate import PassTimes
from megatron_mosaic.sharing.lane import Quota
from megatron_mosaic.sharing.virtual import VirtualLane, virtual_lanes
from tests.ranks import run_ranks

THREE_ON_A_RANK = """
format: 1
world_size: 1
global_batch_size: 4
micro_batch_size: 1
modules:
  vision: {ranks: 0}
  audio: {ranks: 0}
  language: {ranks: 0}
edges: [[vision, language], [audio, language]]
schedule: {kind: concurrent, encoder_group: 2}
"""


class _Engine(TimedEngine):
    """Walks what a test makes of the lanes."""

    changed = staticmethod(lambda walk: walk)

    def in_lanes(self, steps):
        return self.changed(super().in_lanes(steps))


def _engine(rank, text):
    plan = Plan.loads(text, "a test")
    timed = TimedPlan(
        name="", plan=plan, tasks_s=dict.fromkeys(stage_order(plan), PassTimes(0.0, 0.0))
    )
    lanes = virtual_lanes([Quota(lane=name) for name in lanes_of(plan, rank)])
    return _Engine(timed, rank=rank, lanes=lanes)


def _without_each_event(walk):
    """The same walk as often as there are events, each time without another one of them."""
    for position, step in enumerate(walk.steps):
        for before in step.after:
            fewer = step._replace(after=tuple(each for each in step.after if each != before))
            steps = (*walk.steps[:position], fewer, *walk.steps[position + 1 :])
            yield f"{before} -> {position}", replace(walk, steps=steps)
    for end in Joins._fields:
        names = getattr(walk.joined, end)
        for name in names:
            fewer = walk.joined._replace(**{end: tuple(each for each in names if each != name)})
            yield f"{end} {name}", replace(walk, joined=fewer)


def _drop_each_event(rank, text):
    """Runs a step without each event of this rank. Returns what the engine says each time."""
    walks: list[LaneWalk] = []
    engine = _engine(rank, text)
    engine.changed = lambda walk: walks.append(walk) or walk
    engine.step(waits=False)
    engine.step(waits=False)
    engine.destroy()
    said = {}
    for what, walk in _without_each_event(walks[-1]):
        engine = _engine(rank, text)
        engine.changed = lambda own, walk=walk: walk if own.steps else own
        try:
            engine.step(waits=False)
        except AssertionError as error:
            said[what] = str(error)
        else:
            said[what] = ""
    return said


def test_engine_notices_each_event_that_is_missing():
    (said,) = run_ranks(_drop_each_event, 1, THREE_ON_A_RANK)

    # Rows of four microbatches of two encoders, and their gradients; two lanes begin with what the
    # loop has prepared, and the loop goes on with what the same two do last.
    assert len(said) == 4 * 2 * 2 + 2 + 2
    assert all("without waiting for lane" in words for words in said.values()), said


def _hold(rank, text):
    """Runs a step. Returns how often each lane held memory of another one."""
    engine = _engine(rank, text)
    held = Counter()

    def hold(lane, tensor):
        held[lane.name] += 1

    VirtualLane.hold = hold
    engine.step(waits=False)
    return dict(held)


def test_lane_that_waits_holds_the_memory_of_the_lane_that_posted():
    (held,) = run_ranks(_hold, 1, THREE_ON_A_RANK)

    # Rows that stay on their rank, and what is made of them, for each microbatch and encoder.
    assert held == {"language": 2 * 4 * 2, "vision": 2 * 4, "audio": 2 * 4}


def test_stages_of_one_module_hold_nothing():
    # All of a module's own transfers are posted and waited for in its lane.
    stages = THREE_ON_A_RANK.replace(
        "  language: {ranks: 0}", "  language: {ranks: 0, virtual_pipeline_model_parallel_size: 2}"
    )
    (held,) = run_ranks(_hold, 1, stages)

    assert held == {"language": 2 * 4 * 2, "vision": 2 * 4, "audio": 2 * 4}
