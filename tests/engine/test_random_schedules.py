"""A sample of the ten thousand random plans and orders, on real ranks.

``tests/schedule/test_random_schedules.py`` lets pure functions judge them. Here the engine runs
what ``verify`` accepts: processes that exchange real tensors, in modules that compute nothing.
"""

import random
from collections import Counter
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
import torch.distributed as dist

from benchmarks.timed_plans import TimedPlan
from benchmarks.timed_run import TimedEngine
from megatron_mosaic.engine.trace import HostClock, TaskTrace
from megatron_mosaic.errors import PlanError
from megatron_mosaic.layout.plan import Plan
from megatron_mosaic.layout.unsupported import refuse_unsupported
from megatron_mosaic.schedule.build import build_schedule
from megatron_mosaic.schedule.graph import stage_order
from megatron_mosaic.schedule.lanes import has_lanes, lanes_of
from megatron_mosaic.schedule.measured import read_trace
from megatron_mosaic.schedule.schedule import Schedule
from megatron_mosaic.schedule.simulate import PassTimes
from megatron_mosaic.sharing.lane import Quota
from megatron_mosaic.sharing.virtual import virtual_lanes
from tests.ranks import run_ranks
from tests.schedule.test_random_schedules import KINDS, accepts, some_plan, some_schedule

WORLD_SIZES = (2, 3, 4, 5)
FEATURES = {
    *("no_pipelining", "1f1b", "interleaved", "colocated", "bubble_fill", "concurrent"),
    *("three-phase", "lanes", "encoder chunks", "several microbatches in a task", "ahead"),
    *("several encoders", "output module", "frozen module", "evaluation", "other order"),
}
WANTED = 10  # plans with each of these
STEPS = 2  # what runs ahead does so from the first step to the second


class Drawn(NamedTuple):
    """A random plan and an order of its tasks that ``verify`` accepts."""

    plan: Plan
    schedule: Schedule

    def features(self) -> set[str]:
        """What is special about them."""
        plan, choice = self.plan, self.plan.schedule
        chunks = [plan.modules[name].virtual_pipeline_model_parallel_size for name in plan.encoders]
        features = {
            "three-phase": choice.kind == "colocated" and choice.encoder_group is None,
            "encoder chunks": choice.kind == "bubble_fill" and max(chunks, default=1) > 1,
            "lanes": max(len(lanes_of(plan, rank)) for rank in range(plan.world_size)) > 1,
            "several microbatches in a task": (choice.encoder_group or 1) > 1,
            "ahead": bool(self.schedule.ahead),
            "several encoders": len(plan.encoders) > 1,
            "output module": bool(plan.outputs),
            "frozen module": any(each.trainable == () for each in plan.modules.values()),
            "evaluation": self.schedule.forward_only,
            "other order": self.schedule.tasks != self._as_built().tasks,
        }
        return {choice.kind} | {feature for feature, has in features.items() if has}

    def _as_built(self) -> Schedule:
        return build_schedule(
            self.plan,
            num_microbatches=self.schedule.num_microbatches,
            forward_only=self.schedule.forward_only,
        )


def _runs(plan: Plan) -> bool:
    """Whether the runtime takes such a plan, with stand-ins that keep whole sequences."""
    try:
        refuse_unsupported(plan)
    except PlanError:
        return False
    return all(each.context_parallel_size == 1 for each in plan.modules.values())


@cache
def sample() -> tuple[Drawn, ...]:
    """Takes of random plans those with something special that is still rare among them."""
    rng = random.Random(0)
    drawn: list[Drawn] = []
    counts: Counter[str] = Counter()
    while any(counts[feature] < WANTED for feature in FEATURES):
        plan = some_plan(rng, (*KINDS, "concurrent"))
        if plan.world_size not in WORLD_SIZES or not _runs(plan):
            continue
        one = Drawn(plan, some_schedule(rng, plan))
        if accepts(*one) and any(counts[feature] < WANTED for feature in one.features()):
            drawn.append(one)
            counts.update(one.features())
    return tuple(drawn)


def _run(rank: int, drawn: list[Drawn], folder: str) -> None:
    for number, (plan, schedule) in enumerate(drawn):
        timed = TimedPlan(
            name="", plan=plan, tasks_s=dict.fromkeys(stage_order(plan), PassTimes(0.0, 0.0))
        )
        with TaskTrace(Path(folder) / str(number), rank=rank, clock=HostClock()) as trace:
            lanes = virtual_lanes([Quota(lane=name) for name in lanes_of(plan, rank)])
            engine = TimedEngine(
                timed,
                rank=rank,
                trace=trace,
                schedule=schedule,
                lanes=lanes if has_lanes(plan) else None,
            )
            for _ in range(STEPS):
                engine.step(waits=False)
        dist.barrier()
        engine.destroy()


def test_sample_is_of_fifty_plans_and_more():
    assert len(sample()) >= 50


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_whatever_verify_accepts_runs_on_ranks_in_its_order(world_size, tmp_path):
    drawn = [one for one in sample() if one.plan.world_size == world_size]

    run_ranks(_run, world_size, drawn, str(tmp_path))

    for number, (_, schedule) in enumerate(drawn):
        steps = read_trace(tmp_path / str(number))
        assert [step.number for step in steps] == list(range(STEPS))
        for rank, tasks in enumerate(schedule.tasks):
            # Before the first step runs what the others find prepared.
            prologue = tuple(task for task in tasks if task.module in schedule.ahead)
            first, second = (
                tuple(span.task for span in step.spans.get(rank, ())) for step in steps
            )
            assert first == prologue + tasks
            assert second == tasks
