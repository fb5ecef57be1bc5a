"""Runs the step of a plan on one GPU: the tasks of its schedule, each in its lane."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from benchmarks.sharing.cases import LANGUAGE, Case
from benchmarks.sharing.setting import Setting
from megatron_mosaic.layout.placement import ModulePlacement
from megatron_mosaic.layout.plan import Plan, ScheduleChoice
from megatron_mosaic.layout.share import Share
from megatron_mosaic.schedule.alone import alone_tasks
from megatron_mosaic.schedule.build import build_schedule
from megatron_mosaic.schedule.lanes import Joins, LaneStep, has_lanes, joins, lane_steps
from megatron_mosaic.schedule.races import accesses
from megatron_mosaic.schedule.steps import Compute, steps_of
from megatron_mosaic.schedule.task import Task
from megatron_mosaic.sharing.lane import Lane, Lanes

Batch = Mapping[str, Sequence[torch.Tensor]]
"""Of every module what it takes of each microbatch."""


def plan_of(
    case: Case,
    *,
    sms: Mapping[str, int | None] | None,
    encoder_group: int = 1,
) -> Plan:
    """The plan of a case on one GPU.

    Args:
        case: The case.
        sms: Quotas of the modules, which then run at the same time; None is one after the other.
        encoder_group: Microbatches of one task of an encoder.
    """
    quota = {name: (sms or {}).get(name) for name in case.modules}
    return Plan(
        world_size=1,
        global_batch_size=case.num_microbatches,
        micro_batch_size=1,
        modules={
            name: ModulePlacement(name=name, ranks=(0,), share=Share(sms=own) if own else None)
            for name, own in quota.items()
        },
        edges=tuple((name, LANGUAGE) for name in sorted(case.encoders)),
        schedule=ScheduleChoice(
            kind="colocated" if sms is None else "concurrent", encoder_group=encoder_group
        ),
    )


def steps_for(plan: Plan) -> tuple[LaneStep, ...]:
    """What the one rank of a plan does, in the order in which it is launched."""
    schedule = build_schedule(plan)
    alone_there = alone_tasks(plan, schedule, 0)
    return lane_steps(plan, steps_of(plan, schedule, 0), 0, alone=alone_there)


def draw_batch(case: Case, setting: Setting) -> Batch:
    """Draws what every microbatch holds, the same on every call."""
    generator = torch.Generator(device=setting.device).manual_seed(setting.seed + 1)
    batch: dict[str, list[torch.Tensor]] = {}
    for name, tower in sorted(case.encoders.items()):
        shape = (tower.items, tower.tokens, tower.hidden)
        batch[name] = [
            torch.randn(shape, generator=generator, device=setting.device, dtype=setting.dtype)
            for _ in range(case.num_microbatches)
        ]
    language = case.language
    batch[LANGUAGE] = [
        torch.randint(
            language.vocab or 1,
            (language.items, language.tokens),
            generator=generator,
            device=setting.device,
        )
        for _ in range(case.num_microbatches)
    ]
    return batch


class StepRun:
    """One step of training: gradients of all microbatches, from zero.

    Args:
        modules: Modules by name; their gradients are there.
        batch: What they take.
        plan: What to do with one rank.
        lanes: Where. Steps of a plan without lanes run in the main one.
    """

    def __init__(
        self, modules: Mapping[str, nn.Module], batch: Batch, plan: Plan, lanes: Lanes
    ) -> None:
        self._modules = modules
        self._batch = batch
        self.steps = steps = steps_for(plan)
        self._used = accesses(plan, [step.step for step in steps])
        self._joins = joins(steps) if lanes.named and has_lanes(plan) else Joins((), ())
        self._lanes = lanes
        self._awaited = {before for step in steps for before in step.after}
        self._kept: dict[tuple[str, int], Any] = {}
        self._leaves: dict[tuple[str, int], torch.Tensor] = {}

    def __call__(self) -> None:
        """Launches the step; what is launched in the main lane afterwards comes after it."""
        main, named = self._lanes.main, self._lanes.named
        for module in self._modules.values():
            torch._foreach_zero_([own.grad for own in module.parameters() if own.grad is not None])
        begun = main.record()
        for name in self._joins.begin:
            named[name].wait(begun)
        events: dict[int, Any] = {}
        for position, step in enumerate(self.steps):
            lane = named.get(step.lane, main)
            for before in step.after:
                lane.wait(events[before])
            self._check(step.lane, position)
            if isinstance(step.step, Compute):
                with lane.active(whole=step.whole):
                    self._run(step.step.task, lane)
            if position in self._awaited:
                events[position] = lane.record()
        for name in self._joins.end:
            main.wait(named[name].record())

    def _check(self, lane: str, position: int) -> None:
        """Tells virtual lanes what a step reads and writes."""
        if self._lanes.races is not None:
            for what, writes in self._used[position]:
                race = self._lanes.races.access(lane, what, writes=writes)
                assert race is None, str(race)

    def _run(self, task: Task, lane: Lane) -> None:
        if task.module == LANGUAGE:
            run = self._language_forward if task.kind == "F" else self._language_backward
        else:
            run = self._encoder_forward if task.kind == "F" else self._encoder_backward
        run(task, lane)

    def _encoder_forward(self, task: Task, lane: Lane) -> None:
        own = self._batch[task.module]
        items = torch.cat([own[m] for m in task.microbatches])
        rows = self._modules[task.module](items)
        self._kept[task.module, task.microbatches[0]] = rows
        parts = rows.detach().chunk(len(task.microbatches))
        for microbatch, part in zip(task.microbatches, parts, strict=True):
            self._leaves[task.module, microbatch] = part.requires_grad_()

    def _language_forward(self, task: Task, lane: Lane) -> None:
        (microbatch,) = task.microbatches
        rows = [leaf for (_, own), leaf in sorted(self._leaves.items()) if own == microbatch]
        for each in rows:
            lane.hold(each)
        words = self._batch[LANGUAGE][microbatch]
        self._kept[LANGUAGE, microbatch] = self._modules[LANGUAGE](words, rows)

    def _language_backward(self, task: Task, lane: Lane) -> None:
        self._kept.pop((LANGUAGE, task.microbatches[0])).backward()

    def _encoder_backward(self, task: Task, lane: Lane) -> None:
        leaves = [self._leaves.pop((task.module, m)) for m in task.microbatches]
        grads = [leaf.grad for leaf in leaves if leaf.grad is not None]
        for grad in grads:
            lane.hold(grad)
        self._kept.pop((task.module, task.microbatches[0])).backward(torch.cat(grads))


def gradients(modules: Mapping[str, nn.Module]) -> dict[str, list[torch.Tensor]]:
    """Copies the gradients of all modules."""
    return {
        name: [parameter.grad.clone() for parameter in module.parameters()
               if parameter.grad is not None]
        for name, module in modules.items()
    }  # fmt: skip


def relative_errors(
    modules: Mapping[str, nn.Module], reference: Mapping[str, Sequence[torch.Tensor]]
) -> dict[str, float]:
    """Norm of the difference of each module's gradient over the norm of the reference."""
    found = {}
    for name, own in gradients(modules).items():
        pairs = list(zip(own, reference[name], strict=True))
        off = sum((a.float() - b.float()).square().sum() for a, b in pairs)
        size = sum(b.float().square().sum() for _, b in pairs)
        found[name] = float((torch.as_tensor(off) / torch.as_tensor(size)).sqrt())
    return found


def first_microbatch(batch: Batch) -> Batch:
    """The first microbatch alone."""
    return {name: own[:1] for name, own in batch.items()}


def alone(modules: Mapping[str, nn.Module], batch: Batch, name: str) -> Callable[[], None]:
    """Returns what runs all microbatches of one module, with nothing else on the GPU."""
    own = batch[name]
    others = sorted(set(modules) - {name})
    rows: list[list[torch.Tensor]] = []
    if name == LANGUAGE:
        with torch.no_grad():
            rows = [[modules[other](batch[other][m]) for other in others] for m in range(len(own))]

    def run() -> None:
        for microbatch, items in enumerate(own):
            if name == LANGUAGE:
                leaves = [each.detach().requires_grad_() for each in rows[microbatch]]
                modules[name](items, leaves).backward()
            else:
                out = modules[name](items)
                out.backward(torch.ones_like(out))

    return run
