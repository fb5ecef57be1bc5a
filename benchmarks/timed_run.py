"""Runs plans through the engine with modules that wait instead of computing."""

import gc
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
import torch.distributed as dist

from benchmarks.timed_plans import TimedPlan
from megatron_mosaic.comm.boundary import ItemShape, Samples, TaskOwners
from megatron_mosaic.comm.groups import GroupFactory
from megatron_mosaic.engine.lanes import LaneWalk, LaneWalker, in_lanes
from megatron_mosaic.engine.progress import Progress
from megatron_mosaic.engine.trace import HostClock, TaskTrace
from megatron_mosaic.engine.walk import Rows, Walker
from megatron_mosaic.host.channels import ActivationSizes, ChannelSet, RowFacts
from megatron_mosaic.layout.item_costs import ItemCost
from megatron_mosaic.layout.plan import Plan
from megatron_mosaic.layout.rows import Interval
from megatron_mosaic.schedule.ahead import Part, prologue_of
from megatron_mosaic.schedule.build import build_schedule
from megatron_mosaic.schedule.graph import Stage, hosted_stages
from megatron_mosaic.schedule.schedule import Schedule
from megatron_mosaic.schedule.steps import Step, steps_of
from megatron_mosaic.schedule.task import Task
from megatron_mosaic.sharing.lane import Lanes

HIDDEN_SIZE = 16
SEQUENCE_LENGTH = 8
ITEM_ROWS = 2
"""Sizes are small: what a transfer carries takes no time, what is left is its latency."""


def hurry() -> None:
    """Lets this process go before others where the system permits: waits then end in time.

    On a machine that others use, a wait of 20 ms ends after up to 110; in real time after 20.1.
    """
    with suppress(PermissionError):
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))  # threads made later inherit it
    gc.disable()


class Counts(NamedTuple):
    """Steps of a plan: those without waits come first, and warm up."""

    without_waits: int
    with_waits: int


class StepImages(NamedTuple):
    """Images of a step, in an encoder that deals them, or has them in order."""

    module: str
    samples: Samples
    owners: TaskOwners
    works_s: Mapping[int, Mapping[tuple[int, ...], float]]
    """Time of each forward task, by replica."""


class WaitingStage:
    """Runs a stage's tasks: each takes the time that it is given, and leaves zeros.

    Args:
        stage: The stage.
        timed: The plan and its times.
        channels: Know the shapes of what leaves.
        longest: Microbatches of every stage's longest task.
        works_s: Time of each forward task on this rank, if not in proportion to its microbatches.
    """

    def __init__(
        self,
        stage: Stage,
        *,
        timed: TimedPlan,
        channels: ChannelSet,
        longest: Mapping[Stage, int],
        works_s: Mapping[tuple[int, ...], float] | None = None,
    ) -> None:
        self.waits = True
        self._module = stage.module
        self._is_last = stage.stage + 1 == timed.plan.modules[stage.module].num_stages
        self._micro_batch_size = timed.plan.micro_batch_size
        self._channels = channels
        self._times = timed.tasks_s[stage]
        self._longest = longest[stage]
        self._works_s = works_s
        self._received: dict[Task, Mapping[str, torch.Tensor]] = {}

    def forward(self, task: Task, received: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
        """Waits, and makes what leaves the stage."""
        until_s = time.monotonic() + self._wait_s(task)
        self._received[task] = received
        leaving = self._leaving(task)
        wait_until(until_s)
        return leaving

    def backward(self, task: Task, received: torch.Tensor | None) -> Mapping[str, torch.Tensor]:
        """Waits, and lets what was received be its own gradient."""
        until_s = time.monotonic() + self._wait_s(task)
        gradients = self._received.pop(task._replace(kind="F"))
        wait_until(until_s)
        return gradients

    def _wait_s(self, task: Task) -> float:
        if not self.waits:
            return 0.0
        if self._works_s is not None:
            passes = self._times.backward_s / self._times.forward_s if task.kind == "B" else 1.0
            return passes * self._works_s[task.microbatches]
        return self._times[task.kind == "B"] * len(task.microbatches) / self._longest

    def _leaving(self, task: Task) -> torch.Tensor | None:
        name, microbatches = self._module, task.microbatches
        if not self._is_last:
            samples = self._micro_batch_size * len(microbatches)
            if name == "language":
                return torch.zeros(SEQUENCE_LENGTH, samples, HIDDEN_SIZE)
            items = self._channels.items_made(name, microbatches)
            return torch.zeros(ITEM_ROWS, items, HIDDEN_SIZE)
        if not any(edge.source == name for edge in self._channels.routes):
            return None
        return torch.zeros(self._channels.rows_made(name, microbatches), HIDDEN_SIZE)


def wait_until(until_s: float) -> None:
    """Sleeps, without using a core."""
    left_s = until_s - time.monotonic()
    if left_s > 0:
        time.sleep(left_s)


def run_on_rank(rank: int, plans: Sequence[TimedPlan], folder: str, counts: Counts) -> list[float]:
    """Runs every plan several times over, in one process. Called on every rank.

    Args:
        rank: This rank.
        plans: What to run.
        folder: The trace of every plan goes into one of its folders, by position.
        counts: Steps of each plan.

    Returns:
        For every plan the processor time of a task of this rank, without waits; 0 if it has none.
    """
    hurry()
    return [
        run_plan(rank, timed, Path(folder) / str(number), counts)
        for number, timed in enumerate(plans)
    ]


def run_plan(rank: int, timed: TimedPlan, folder: Path, counts: Counts) -> float:
    """Runs one plan, and writes its trace. Called on every rank."""
    num_tasks = len(build_schedule(timed.plan).tasks[rank])
    processor_s = []
    with TaskTrace(folder, rank=rank, clock=HostClock()) as trace:
        engine = TimedEngine(timed, rank=rank, trace=trace)
        for number in range(sum(counts)):
            dist.barrier()
            before_s = time.thread_time()
            engine.step(waits=number >= counts.without_waits)
            processor_s.append(time.thread_time() - before_s)
    dist.barrier()
    engine.destroy()
    return median(processor_s[: counts.without_waits]) / max(num_tasks, 1)


class TimedEngine:
    """The engine on a rank, with a plan's channels and modules that wait.

    Args:
        timed: The plan and its times.
        rank: This rank.
        trace: Writes down the tasks, if any.
        schedule: Runs in place of the one that is built for the plan.
        images: Of every step, where they are unlike.
        lanes: Lanes of the rank, if its modules run at the same time.

    Note:
        Collective over the world.
    """

    def __init__(
        self,
        timed: TimedPlan,
        *,
        rank: int,
        trace: TaskTrace | None = None,
        schedule: Schedule | None = None,
        images: StepImages | None = None,
        lanes: Lanes | None = None,
    ) -> None:
        self._plan = plan = timed.plan
        self._rank = rank
        self._lanes = lanes
        self._schedule = schedule or build_schedule(plan)
        self._steps = steps_of(plan, self._schedule, rank)
        self._factory = GroupFactory(rank)
        self._channels = _channels(plan, self._factory, rank)
        longest = longest_tasks(self._schedule)
        self._runners = {
            stage: WaitingStage(
                stage,
                timed=timed,
                channels=self._channels,
                longest=longest,
                works_s=_works_s(images, stage, plan, rank),
            )
            for stage in hosted_stages(plan, rank)
        }
        item = (Interval(0, ITEM_ROWS),)
        samples_per_microbatch = plan.global_batch_size // plan.num_microbatches
        num_samples = samples_per_microbatch * self._schedule.num_microbatches
        self._samples: dict[str, Samples] = dict.fromkeys(plan.modules, (item,) * num_samples)
        self._owners: dict[str, TaskOwners] = {}
        if images is not None:
            self._samples[images.module] = images.samples
            self._owners[images.module] = images.owners
        self._progress = Progress(trace=trace)
        self._kept: Rows | None = None

    def step(self, *, waits: bool) -> None:
        """Runs a step, as the engine's users do."""
        for runner in self._runners.values():
            runner.waits = waits
        progress, schedule = self._progress, self._schedule
        part = Part.BEGINS if self._kept is None else Part(0)
        prologue = prologue_of(self._steps, schedule, part)
        self._channels.begin(self._samples, schedule=schedule, owners=self._owners)
        progress.begin_step(
            progress.place.count + 1,
            num_microbatches=schedule.num_microbatches,
            forward_only=False,
            part=part,
        )
        if self._kept is None:
            self._kept = self._walk(prologue, {})
        self._kept = self._walk(self._steps, self._kept, first=len(prologue))
        progress.close_step(len(prologue) + len(self._steps))
        progress.end_step()

    def _walk(self, steps: Sequence[Step], kept: Rows, *, first: int = 0) -> Rows:
        if self._lanes is None:
            walker = Walker(
                runners=self._runners,
                channels=self._channels.open,
                progress=self._progress,
                schedule=self._schedule,
                kept=kept,
            )
            return walker.walk(steps, first=first)
        lane_walker = LaneWalker(
            lanes=self._lanes,
            runners=self._runners,
            channels=self._channels.open,
            progress=self._progress,
            schedule=self._schedule,
            kept=kept,
        )
        return lane_walker.walk_in_lanes(self.in_lanes(steps), first=first)

    def in_lanes(self, steps: Sequence[Step]) -> LaneWalk:
        """Puts steps of this rank into its lanes."""
        races = self._lanes is not None and self._lanes.races is not None
        return in_lanes(self._plan, self._schedule, steps, self._rank, races=races)

    def destroy(self) -> None:
        """Destroys the groups that were made."""
        self._factory.destroy()


def longest_tasks(schedule: Schedule) -> dict[Stage, int]:
    """Most microbatches of a task of every stage."""
    longest: dict[Stage, int] = {}
    for task in {task for tasks in schedule.tasks for task in tasks}:
        stage = Stage(task.module, task.stage)
        longest[stage] = max(longest.get(stage, 0), len(task.microbatches))
    return longest


def _works_s(
    images: StepImages | None, stage: Stage, plan: Plan, rank: int
) -> Mapping[tuple[int, ...], float] | None:
    if images is None or stage.module != images.module:
        return None
    return images.works_s[plan.modules[stage.module].coordinates(rank).dp]


def _channels(plan: Plan, factory: GroupFactory, rank: int) -> ChannelSet:
    channels = ChannelSet(plan, factory, rank=rank, nodes=(0,) * plan.world_size)
    facts = RowFacts(
        width=HIDDEN_SIZE,
        flops=0.0,
        item=ItemShape(rows=ITEM_ROWS, tokens=ITEM_ROWS, hidden_size=HIDDEN_SIZE),
        item_cost=ItemCost(item_rows=ITEM_ROWS, row_flops=0.0, pair_flops=0.0),
        keeps_parts=False,
        sequence_length=SEQUENCE_LENGTH,
    )
    sizes = ActivationSizes(
        hidden_size=HIDDEN_SIZE,
        sequence_length=SEQUENCE_LENGTH,
        rows=dict.fromkeys(plan.modules, facts),
        dtype=torch.float32,
    )
    channels.open_all(sizes, device=torch.device("cpu"))
    return channels
