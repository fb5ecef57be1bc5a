"""Plans, most for eight ranks, with the time that each stage's tasks are made to take."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from megatron_mosaic.layout.placement import ModulePlacement
from megatron_mosaic.layout.plan import Plan, ScheduleChoice, ScheduleKind
from megatron_mosaic.schedule.fill import fill
from megatron_mosaic.schedule.graph import Stage, stage_order
from megatron_mosaic.schedule.order import write_order
from megatron_mosaic.schedule.simulate import PassTimes

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


def _times(*forward_ms: float, backward: float = 2.0) -> list[PassTimes]:
    return [PassTimes(ms / 1000, backward * ms / 1000) for ms in forward_ms]


def fidelity_plans() -> list[TimedPlan]:
    """Plans of every schedule and kind of layout; no task takes less than 20 ms."""
    return _plain_plans() + _filled_plans()


def _plain_plans() -> list[TimedPlan]:
    (short,), (middle,), (long,) = _times(30), _times(40), _times(80)
    frozen = PassTimes(0.04, 0.0)
    return [
        timed(
            "1F1B, deep",
            "1f1b",
            [place("vision", [0]), place("language", range(1, 8), pp=7)],
            num_microbatches=9,
            waits_s={"vision": short, "language": short},
        ),
        timed(
            "1F1B, uneven stages",
            "1f1b",
            [place("vision", [0]), place("language", range(1, 8), pp=7)],
            num_microbatches=8,
            waits_s={"vision": middle, "language": _times(20, 35, 22, 40, 25, 20, 30)},
        ),
        timed(
            "1F1B, pipelined encoder",
            "1f1b",
            [place("vision", range(3), pp=3), place("language", range(3, 8), pp=5)],
            num_microbatches=9,
            waits_s={"vision": _times(20, 24, 28), "language": middle},
        ),
        timed(
            "1F1B, two encoders",
            "1f1b",
            [place("vision", [0]), place("audio", [1]), place("language", range(2, 8), pp=6)],
            num_microbatches=9,
            waits_s={"vision": middle, "audio": short, "language": short},
        ),
        timed(
            "1F1B, replicas on disjoint ranks",
            "1f1b",
            [place("vision", range(4), dp=4), place("language", range(4, 8), tp=2, pp=2)],
            num_microbatches=9,
            waits_s={"vision": middle, "language": short},
        ),
        timed(
            "1F1B, unlike replicas, slow encoder",
            "1f1b",
            [place("vision", range(2), tp=2), place("language", range(2, 8), dp=2, pp=3)],
            num_microbatches=8,
            waits_s={"vision": long, "language": short},
        ),
        timed(
            "1F1B, frozen encoder",
            "1f1b",
            [place("vision", [0, 1], dp=2, trainable=()), place("language", range(2, 8), pp=6)],
            num_microbatches=9,
            waits_s={"vision": frozen, "language": short},
        ),
        timed(
            "1F1B, output module",
            "1f1b",
            [
                place("vision", [0]),
                place("language", range(1, 6), pp=5),
                place("generator", [6, 7], tp=2),
            ],
            num_microbatches=8,
            waits_s={"vision": short, "language": short, "generator": middle},
            output="generator",
        ),
        timed(
            "colocated, groups of 4",
            "colocated",
            [place("vision", range(8), dp=8), place("language", range(8), tp=2, pp=4)],
            num_microbatches=12,
            waits_s={"vision": long, "language": short},
            group=4,
        ),
        timed(
            "colocated, uneven stages",
            "colocated",
            [place("vision", range(8), tp=2, dp=4), place("language", range(8), dp=2, pp=4)],
            num_microbatches=8,
            waits_s={"vision": _times(80), "language": _times(20, 30, 30, 20)},
            group=4,
        ),
        timed(
            "three-phase",
            "colocated",
            [place("vision", range(8), dp=8), place("language", range(8), tp=2, pp=4)],
            num_microbatches=9,
            waits_s={"vision": _times(160), "language": short},
        ),
        timed(
            "partial overlap",
            "colocated",
            [place("vision", range(4), dp=4), place("language", range(2, 8), dp=2, pp=3)],
            num_microbatches=12,
            waits_s={"vision": long, "language": short},
            group=3,
        ),
        timed(
            "colocated, one of two encoders frozen",
            "colocated",
            [
                place("vision", range(8), dp=8, trainable=()),
                place("audio", range(4), dp=4),
                place("language", range(8), tp=2, pp=4),
            ],
            num_microbatches=8,
            waits_s={"vision": frozen, "audio": middle, "language": short},
            group=4,
        ),
        timed(
            "groups of an encoder on ranks of its own",
            "colocated",
            [place("vision", range(2), dp=2), place("language", range(2, 8), pp=6)],
            num_microbatches=10,
            waits_s={"vision": long, "language": short},
            group=2,
        ),
        timed(
            "no pipelining",
            "no_pipelining",
            [place("vision", range(8), dp=8), place("language", range(8), tp=4, dp=2)],
            num_microbatches=8,
            waits_s={"vision": short, "language": middle},
        ),
    ]


def _filled_plans() -> list[TimedPlan]:
    """Plans with several stages of a module on a rank, or encoders in the waits of a pipeline."""
    (short,), (middle,) = _times(30), _times(40)
    everywhere = place("vision", range(8), dp=8)
    pipeline = place("language", range(8), tp=2, pp=4)
    return [
        timed(
            "interleaved",
            "interleaved",
            [place("vision", [0, 1], tp=2), place("language", range(2, 8), dp=2, pp=3, virtual=2)],
            num_microbatches=9,
            waits_s={"vision": middle, "language": short},
        ),
        timed(
            "bubble filling",
            "bubble_fill",
            [everywhere, pipeline],
            num_microbatches=8,
            waits_s={"vision": short, "language": middle},
        ),
        timed(
            "bubble filling, at most 3 live",
            "bubble_fill",
            [place("vision", range(8), tp=2, dp=4), pipeline],
            num_microbatches=8,
            waits_s={"vision": middle, "language": _times(40, 30, 50, 40)},
            group=2,
            max_live=3,
        ),
        timed(
            "bubble filling, encoder in chunks",
            "bubble_fill",
            [place("vision", range(8), dp=8, virtual=2), pipeline],
            num_microbatches=8,
            waits_s={"vision": short, "language": middle},
            group=2,
        ),
        timed(
            "bubble filling, frozen encoder a step ahead",
            "bubble_fill",
            [place("vision", range(8), dp=8, trainable=()), pipeline],
            num_microbatches=8,
            waits_s={"vision": PassTimes(0.04, 0.0), "language": middle},
            ahead=True,
        ),
    ]


def upstream_plans() -> list[TimedPlan]:
    """Those of the plans that upstream has a schedule for, with pairs of unlike sizes.

    It knows consecutive ranks, and one backward pass of every module; a module of its own for
    each rank, or encoders over the whole batch on all ranks of the language model.
    """
    kept = {
        "1F1B, deep",
        "1F1B, pipelined encoder",
        "1F1B, two encoders",
        "1F1B, replicas on disjoint ranks",
        "1F1B, unlike replicas, slow encoder",
        "three-phase",
    }
    return [timed for timed in _plain_plans() if timed.name in kept]
