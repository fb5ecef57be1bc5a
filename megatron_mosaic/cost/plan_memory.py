"""Memory of the ranks of a plan, term by term."""

from collections.abc import Mapping, Sequence
from math import ceil

from megatron_mosaic.cost.costs import StageMemory
from megatron_mosaic.layout.placement import LANGUAGE
from megatron_mosaic.layout.plan import Plan
from megatron_mosaic.schedule.build import max_live
from megatron_mosaic.schedule.colocated import encoder_groups
from megatron_mosaic.schedule.graph import Stage, rank_kinds, upstream

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


def ranks_memory(
    plan: Plan, stages: Mapping[str, Sequence[StageMemory]]
) -> dict[tuple[Stage, ...], dict[str, float]]:
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
        kind.stages: _together([peaks[stage] for stage in kind.stages])
        for kind in sorted(rank_kinds(plan))
    }


def task_microbatches(plan: Plan, name: str) -> int:
    """Microbatches of a module's tasks, of the longest where they differ."""
    if plan.schedule.kind not in ("colocated", "bubble_fill") or LANGUAGE in upstream(
        plan, name
    ) | {name}:
        return 1
    return len(encoder_groups(plan, num_microbatches=plan.num_microbatches)[0])


def samples_per_task(plan: Plan, name: str) -> int:
    """Samples that a replica of a module works on in one of its tasks; the fullest replica's."""
    samples = plan.micro_batch_size * plan.language.data_parallel_size
    samples *= task_microbatches(plan, name)
    return ceil(samples / plan.modules[name].data_parallel_size)


def _together(stages: list[Mapping[str, float]]) -> dict[str, float]:
    together = {term: sum(stage[term] for stage in stages) for term in TERMS}
    together["working"] = max(stage["working"] for stage in stages)
    return together
