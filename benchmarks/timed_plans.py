"""Plans, most for eight ranks, with the time that each stage's tasks are made to take."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from megatron_mosaic.layout.placement import ModulePlacement
from megatron_mosaic.layout.plan import Plan, ScheduleChoice, ScheduleKind
from megatron_mosaic.layout.ranks import parse_ranks
from megatron_mosaic.schedule.fill import fill
from megatron_mosaic.schedule.graph import Stage, stage_order
from megatron_mosaic.schedule.order import write_order
from megatron_mosaic.schedule.simulate import PassTimes

PLANS = Path(__file__).resolve().parent / "data" / "timed_plans.yaml"

WORLD_SIZE = 8
MICRO_BATCH_SIZE = 8
"""Every encoder's data-parallel size divides it, so a microbatch splits whichever runs it."""


@dataclass(frozen=True, kw_only=True)
class TimedPlan:
    """A plan whose modules wait instead of computing.

    Args:
        name: What is special about it.
        plan: The plan.
        tasks_s: Of a stage's longest task.
    """

    name: str
    plan: Plan
    tasks_s: Mapping[Stage, PassTimes]


def place(
    name: str,
    ranks: Sequence[int],
    *,
    tp: int = 1,
    dp: int = 1,
    pp: int = 1,
    virtual: int = 1,
    trainable: tuple[str, ...] | None = None,
) -> ModulePlacement:
    """Places a module."""
    return ModulePlacement(
        name=name,
        ranks=tuple(ranks),
        tensor_model_parallel_size=tp,
        data_parallel_size=dp,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=virtual,
        trainable=trainable,
    )


def timed(
    name: str,
    kind: ScheduleKind,
    placements: Sequence[ModulePlacement],
    *,
    num_microbatches: int,
    waits_s: Mapping[str, PassTimes | Sequence[PassTimes]],
    group: int | None = None,
    max_live: int | None = None,
    ahead: bool = False,
    output: str | None = None,
    world_size: int = WORLD_SIZE,
) -> TimedPlan:
    """Makes a plan; its encoders feed the language model.

    Args:
        name: See :class:`TimedPlan`.
        kind: Of the schedule.
        placements: Of the modules.
        num_microbatches: Of a step.
        waits_s: Of the longest task of every stage of a module, or of each of its stages.
        group: Microbatches of an encoder's task.
        max_live: Live tasks of an encoder's stage on a rank, at most.
        ahead: Whether frozen encoders run a step ahead.
        output: Module that the language model feeds.
        world_size: Ranks; those beyond the modules' are idle.
    """
    modules = {placement.name: placement for placement in placements}
    encoders = [name for name in modules if name not in ("language", output)]
    plan = Plan(
        world_size=world_size,
        global_batch_size=(
            num_microbatches * MICRO_BATCH_SIZE * modules["language"].data_parallel_size
        ),
        micro_batch_size=MICRO_BATCH_SIZE,
        modules=modules,
        edges=tuple((name, "language") for name in encoders)
        + ((("language", output),) if output else ()),
        schedule=ScheduleChoice(kind=kind, encoder_group=group, max_live=max_live, ahead=ahead),
    )
    tasks_s = {}
    for stage in stage_order(plan):
        given = waits_s[stage.module]
        tasks_s[stage] = given if isinstance(given, PassTimes) else given[stage.stage]
    if kind == "bubble_fill":
        # As the planner does: the order of tasks comes from their times, and stands in the plan.
        order = write_order(plan, fill(plan, tasks_s=tasks_s))
        plan = replace(plan, schedule=replace(plan.schedule, order=order))
    return TimedPlan(name=name, plan=plan, tasks_s=tasks_s)


def fidelity_plans() -> list[TimedPlan]:
    """Plans of every schedule and kind of layout."""
    return [_read(entry) for entry in _entries()]


def upstream_plans() -> list[TimedPlan]:
    """Those of the plans that upstream has a schedule for, with pairs of unlike sizes."""
    return [_read(entry) for entry in _entries() if entry.get("upstream")]


def _entries() -> list[dict[str, Any]]:
    return yaml.safe_load(PLANS.read_text())


def _read(entry: Mapping[str, Any]) -> TimedPlan:
    placements, waits_s = [], {}
    for name, written in entry["modules"].items():
        sizes = {size: written.get(size, 1) for size in ("tp", "dp", "pp", "virtual")}
        trainable = None if written.get("trainable") is None else tuple(written["trainable"])
        ranks = parse_ranks(f"{entry['name']}: {name}", written["ranks"])
        placements.append(place(name, ranks, **sizes, trainable=trainable))
        waits_s[name] = _waits_s(written["wait_ms"], backward=trainable != ())
    schedule = dict(entry["schedule"])
    return timed(
        entry["name"],
        schedule.pop("kind"),
        placements,
        num_microbatches=entry["num_microbatches"],
        waits_s=waits_s,
        output=entry.get("output"),
        **schedule,
    )


def _waits_s(wait_ms: int | list[int], *, backward: bool) -> PassTimes | list[PassTimes]:
    if isinstance(wait_ms, list):
        return [PassTimes(ms / 1000, 2 * ms / 1000 if backward else 0.0) for ms in wait_ms]
    return PassTimes(wait_ms / 1000, 2 * wait_ms / 1000 if backward else 0.0)
