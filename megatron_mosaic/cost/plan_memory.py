"""Memory of the ranks of a plan, term by term."""

from collections import defaultdict
from collections.abc import Container, Mapping, Sequence
from math import ceil

from megatron_mosaic.cost.costs import StageMemory
from megatron_mosaic.layout.placement import LANGUAGE
from megatron_mosaic.layout.plan import Plan
from megatron_mosaic.schedule.build import build_schedule, max_live
from megatron_mosaic.schedule.colocated import encoder_groups, encoder_stages
from megatron_mosaic.schedule.graph import Stage, rank_kinds, upstream
from megatron_mosaic.schedule.lanes import has_lanes, lane_of
from megatron_mosaic.schedule.task import Task

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

    What passes hold for a moment does not add up but where modules run at the same time:
    otherwise one is under way.

    Args:
        plan: The plan.
        stages: Memory of the stages of every module.

    Returns:
        Bytes by term, keyed by the stages that ranks of the kind host; idle ranks have none.
    """
    number = plan.num_microbatches
    if plan.schedule.kind in ("interleaved", "bubble_fill", "concurrent"):
        return _memory_of_lists(plan, stages)
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


def _memory_of_lists(
    plan: Plan, stages: Mapping[str, Sequence[StageMemory]]
) -> dict[tuple[Stage, ...], dict[str, float]]:
    """The same where stages of a rank have their peaks at different times: as the lists have it."""
    schedule, encoders = build_schedule(plan), encoder_stages(plan)
    found = {}
    for kind in sorted(rank_kinds(plan)):
        held = {stage: stages[stage.module][stage.stage] for stage in kind.stages}
        together = _together([memory_terms(memory, live_tasks=0) for memory in held.values()])
        tasks = schedule.tasks[kind.ranks[0]]
        each = {stage: memory.activations_per_task for stage, memory in held.items()}
        pools = _pools(plan, each)
        peaks = (
            _peak_bytes(tasks, pool, encoders=encoders, ahead=schedule.ahead) for pool in pools
        )
        together |= {"activations": sum(peaks), "buffers": _shared_buffers(held)}
        if has_lanes(plan):
            together["working"] = _shared_working(held)
        found[kind.stages] = together
    return found


def _pools(plan: Plan, task_bytes: Mapping[Stage, float]) -> list[dict[Stage, float]]:
    """What tasks hold in each pool of memory: what one lane frees another one does not get.

    Each has an entry for all stages, 0 for those of other lanes. Memory is taken and given back
    when tasks are launched, so that the order of the list is that of all pools. Tasks that are
    alone run in a stream, and so have a pool, of their own: they are few, and count as the others.

    Source:
        PyTorch, notes on CUDA semantics: the caching allocator keeps blocks by stream.
    """
    lanes = dict.fromkeys(lane_of(plan, stage.module) for stage in task_bytes)
    return [
        {
            stage: its if lane_of(plan, stage.module) == lane else 0.0
            for stage, its in task_bytes.items()
        }
        for lane in lanes
    ]


def _shared_working(held: Mapping[Stage, StageMemory]) -> float:
    """What passes hold for a moment where every module has one under way."""
    largest: dict[str, float] = {}
    for stage, memory in held.items():
        largest[stage.module] = max(largest.get(stage.module, 0.0), memory.working)
    return sum(largest.values())


def _peak_bytes(
    tasks: Sequence[Task],
    task_bytes: Mapping[Stage, float],
    *,
    encoders: Container[Stage],
    ahead: frozenset[str],
) -> float:
    """Most that tasks of a rank hold at a time.

    A task holds activations until its backward pass. An encoder's task without one holds the rows
    that it hands over, until the language model on the rank takes the last of their microbatches;
    where there is none, until the step ends. Those of modules that run ahead are there when the
    step begins, and those of the next step when it ends.

    Args:
        tasks: Of the rank, in order.
        task_bytes: What a task of a stage holds.
        encoders: Stages that hand rows to the language model, or to others that do.
        ahead: Modules that run ahead.
    """
    passed_back = {Stage(*task[1:3]) for task in tasks if task.kind == "B"}
    rows_bytes: dict[int, float] = defaultdict(float)  # by the last microbatch that they are for
    for task in tasks:
        if task.module in ahead:
            rows_bytes[task.microbatches[-1]] += task_bytes[Stage(*task[1:3])]
    live_bytes = peak_bytes = sum(rows_bytes.values())
    for task in tasks:
        stage, last = Stage(*task[1:3]), task.microbatches[-1]
        if task.kind == "B":
            live_bytes -= task_bytes[stage]
            continue
        peak_bytes = max(peak_bytes, live_bytes + task_bytes[stage])
        if stage in passed_back or stage in encoders:
            live_bytes += task_bytes[stage]
        if task.module == LANGUAGE:
            live_bytes -= rows_bytes.pop(last, 0.0)
        elif stage not in passed_back and task.module not in ahead:
            rows_bytes[last] += task_bytes[stage]
    return peak_bytes


def task_microbatches(plan: Plan, name: str) -> int:
    """Microbatches of a module's tasks, of the longest where they differ."""
    in_groups = plan.schedule.kind in ("colocated", "bubble_fill", "concurrent")
    if not in_groups or LANGUAGE in upstream(plan, name) | {name}:
        return 1
    return len(encoder_groups(plan, num_microbatches=plan.num_microbatches)[0])


def samples_per_task(plan: Plan, name: str) -> int:
    """Samples that a replica of a module works on in one of its tasks; the fullest replica's."""
    samples = plan.micro_batch_size * plan.language.data_parallel_size
    samples *= task_microbatches(plan, name)
    return ceil(samples / plan.modules[name].data_parallel_size)


def _shared_buffers(held: Mapping[Stage, StageMemory]) -> float:
    """What libraries hold for weights of each shape, which stages of one module share."""
    largest: dict[str, float] = {}
    for stage, memory in held.items():
        largest[stage.module] = max(largest.get(stage.module, 0.0), memory.buffers)
    return sum(largest.values())


def _together(stages: list[Mapping[str, float]]) -> dict[str, float]:
    together = {term: sum(stage[term] for stage in stages) for term in TERMS}
    together["working"] = max(stage["working"] for stage in stages)
    return together
