"""Memory of the ranks of a plan, term by term."""

from collections.abc import Mapping, Sequence

from megatron_mosaic.cost.costs import HostedStage, StageMemory
from megatron_mosaic.cost.memory import live_tasks, module_parts, stages_memory
from megatron_mosaic.cost.sizes import ParallelSizes, TrainingSettings
from megatron_mosaic.layout.placement import LANGUAGE
from megatron_mosaic.layout.plan import Plan, ScheduleChoice
from megatron_mosaic.model.spec import ModelSpec
from megatron_mosaic.schedule.build import max_live
from megatron_mosaic.schedule.colocated import encoder_groups
from megatron_mosaic.schedule.graph import Stage, needs_backward, rank_kinds, upstream

TERMS = ("weights", "gradients", "optimizer", "activations", "working", "buffers")
"""What memory goes to, in the order in which it is shown."""


def memory_terms(stage: StageMemory, *, live_tasks: float) -> dict[str, float]:
    """Splits a stage's peak into terms.

    Args:
        stage: The stage.
        live_tasks: Tasks of which it holds activations at once.
    """
    return {
        "weights": stage.weights,
        "gradients": stage.gradients,
        "optimizer": stage.optimizer,
        "activations": live_tasks * stage.activations_per_task,
        "working": stage.working,
        "buffers": stage.buffers,
    }


def plan_memory(
    plan: Plan, *, model: ModelSpec, settings: TrainingSettings | None = None
) -> dict[tuple[HostedStage, ...], dict[str, float]]:
    """Estimates the memory of every kind of rank of a plan.

    Args:
        plan: The plan.
        model: What it trains.
        settings: What all modules have in common.

    Returns:
        Bytes by term, keyed by the stages that ranks of the kind host; idle ranks have none.
    """
    settings = settings or TrainingSettings()
    stages = {
        name: _module_stages(plan, name, model=model, settings=settings) for name in plan.modules
    }
    return ranks_memory(plan, stages)


def ranks_memory(
    plan: Plan, stages: Mapping[str, Sequence[StageMemory]]
) -> dict[tuple[HostedStage, ...], dict[str, float]]:
    """Adds up the memory of stages that share ranks, as many tasks as the schedule keeps alive.

    What passes hold for a moment does not add up: one is under way at a time.

    Args:
        plan: The plan.
        stages: Memory of the stages of every module.

    Returns:
        Bytes by term, keyed by the stages that ranks of the kind host; idle ranks have none.
    """
    number = plan.num_microbatches
    peaks = {
        Stage(name, index): memory_terms(
            stage, live_tasks=max_live(plan, Stage(name, index), num_microbatches=number)
        )
        for name, its in stages.items()
        for index, stage in enumerate(its)
    }
    return {
        tuple(HostedStage(*stage) for stage in kind.stages): _together(
            [peaks[stage] for stage in kind.stages]
        )
        for kind in sorted(rank_kinds(plan))
    }


def live_in_step(
    name: str,
    stage: int,
    *,
    sizes: Mapping[str, ParallelSizes],
    schedule: ScheduleChoice,
    num_microbatches: int,
    shared: bool,
) -> float:
    """Counts the live tasks of a stage from sizes alone, as the schedules' ``max_live`` does.

    Args:
        name: Its module; encoders feed the language model directly.
        stage: Its index.
        sizes: Of every module.
        schedule: Order of work.
        num_microbatches: Microbatches of the step.
        shared: Whether the module's ranks also host the language model.
    """
    own, language = sizes[name], sizes[LANGUAGE]
    if schedule.kind == "no_pipelining":
        return 1
    if name == LANGUAGE:
        return live_tasks(
            stage, num_stages=own.pp, num_microbatches=num_microbatches, chunks=own.chunks
        )
    if schedule.kind == "1f1b":
        return live_tasks(stage, num_stages=own.pp + language.pp, num_microbatches=num_microbatches)
    group = min(schedule.encoder_group or num_microbatches, num_microbatches)
    in_pipeline = -(-(language.pp - 1) // group)
    return min(-(-num_microbatches // group), 1 + in_pipeline + (not shared))


def samples_per_task(plan: Plan, name: str) -> float:
    """Samples that one replica of a module works on in one of its tasks."""
    samples = plan.micro_batch_size * plan.language.data_parallel_size
    if name != LANGUAGE and plan.schedule.kind == "colocated":
        samples *= len(encoder_groups(plan, num_microbatches=plan.num_microbatches)[0])
    return samples / plan.modules[name].data_parallel_size


def _module_stages(
    plan: Plan, name: str, *, model: ModelSpec, settings: TrainingSettings
) -> tuple[StageMemory, ...]:
    placement = plan.modules[name]
    sizes = ParallelSizes.of(placement)
    parts = module_parts(
        model.modules[name],
        sizes=sizes,
        settings=settings,
        samples=samples_per_task(plan, name),
        precision=model.precision,
        gradient_arrives=any(needs_backward(plan, source) for source in upstream(plan, name)),
    )
    return stages_memory(
        parts,
        sizes=sizes,
        settings=settings,
        precision=model.precision,
        layers_per_stage=placement.layers_per_stage,
    )


def _together(stages: list[Mapping[str, float]]) -> dict[str, float]:
    together = {term: sum(stage[term] for stage in stages) for term in TERMS}
    together["working"] = max(stage["working"] for stage in stages)
    return together
