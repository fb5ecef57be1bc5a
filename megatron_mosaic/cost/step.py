"""Time of a step in closed form, from what its stages cost."""

from collections.abc import Mapping, Sequence
from graphlib import TopologicalSorter

from megatron_mosaic.cost.costs import ModuleInStep, StageCosts, StepBreakdown
from megatron_mosaic.cost.groups import grouped_s
from megatron_mosaic.cost.pipeline import Hop, PipelineStage, interleaved_s, pipeline_s
from megatron_mosaic.layout.placement import LANGUAGE
from megatron_mosaic.layout.plan import ScheduleKind

Edges = Sequence[tuple[str, str]]


def step_breakdown(
    modules: Mapping[str, ModuleInStep],
    *,
    edges: Edges,
    kind: ScheduleKind,
    num_microbatches: int,
    encoder_group: int | None = None,
) -> StepBreakdown:
    """Estimates a step.

    Modules on ranks of their own and the language model are one pipeline. A module on the
    language model's ranks makes the whole pipeline pause for each of its tasks.

    Args:
        modules: All modules of the plan; ``"language"`` is one of them.
        edges: Pairs of source and destination module.
        kind: Schedule.
        num_microbatches: Microbatches of the step.
        encoder_group: Microbatches of one task of a module on shared ranks with ``colocated``;
            None is all of them.
    """
    group = (encoder_group or num_microbatches) if kind == "colocated" else 1
    pauses = [
        (stage, num_microbatches / (module.task_microbatches or group))
        for module in modules.values()
        if module.shared
        for stage in module.stages
    ]
    apart = {name: module for name, module in modules.items() if not module.shared}
    if kind == "no_pipelining":
        total_s = _one_by_one_s(modules, edges, num_microbatches)
    else:
        total_s = _pipelined_s(apart, edges, num_microbatches)
        total_s += sum(num_tasks * _busy_s(stage) for stage, num_tasks in pauses)
    # The rank that is busiest is where time is counted; what it does not work, it waits.
    where, slowest, num_tasks = max(
        (
            (name, stage, num_microbatches / (module.task_microbatches or 1))
            for name, module in apart.items()
            for stage in module.stages
        ),
        key=lambda item: item[2] * _busy_s(item[1]),
    )
    own = [(slowest, num_tasks), *(pauses if where == LANGUAGE else ())]
    busy_s = sum(count * _busy_s(stage) for stage, count in own)
    communication_s = sum(count * stage.communication_s for stage, count in own)
    return StepBreakdown(
        compute_s=busy_s - communication_s,
        communication_s=communication_s,
        bubble_s=max(total_s - busy_s, 0.0),
        sync_s=_once_s(modules, "sync_s"),
        optimizer_s=_once_s(modules, "optimizer_s"),
    )


def _busy_s(stage: StageCosts) -> float:
    return stage.forward_s + stage.backward_s


def _once_s(modules: Mapping[str, ModuleInStep], field: str) -> float:
    """Longest of all ranks; those that host several modules do one after the other."""
    slowest = {
        name: max(getattr(stage, field) for stage in module.stages)
        for name, module in modules.items()
    }
    shared_s = sum(slowest[name] for name, module in modules.items() if module.shared)
    return max(
        own_s + (shared_s if name == LANGUAGE else 0.0)
        for name, own_s in slowest.items()
        if not modules[name].shared
    )


def _pipelined_s(modules: Mapping[str, ModuleInStep], edges: Edges, num_microbatches: int) -> float:
    """Time of modules on ranks of their own."""
    chunks = modules[LANGUAGE].chunks
    grouped = [m for m in modules.values() if (m.task_microbatches or 1) > 1]
    stages = _joint_stages({n: m for n, m in modules.items() if m not in grouped}, edges)

    def joint_s(count: int) -> float:
        if chunks > 1:
            return interleaved_s(stages, chunks=chunks, num_microbatches=count)
        return pipeline_s(stages, num_microbatches=count)

    total_s = joint_s(num_microbatches)
    for module in grouped:
        per_task = module.task_microbatches or 1
        entry_s = modules[LANGUAGE].entry_s or module.stages[-1].hop_s
        behind = len(modules[LANGUAGE].stages) - 1
        limited_s = grouped_s(
            [_pipeline_stage(stage) for stage in module.stages],
            hops_s=[*(stage.hop_s for stage in module.stages[:-1]), entry_s],
            rest_s=(joint_s(min(per_task, num_microbatches)), joint_s(num_microbatches)),
            num_tasks=-(-num_microbatches // per_task),
            depth=-(-behind // per_task),
        )
        total_s = max(total_s, limited_s)
    return total_s


def _joint_stages(modules: Mapping[str, ModuleInStep], edges: Edges) -> list[PipelineStage]:
    """Stages of all modules as one pipeline, each after those that feed it."""
    joined = [edge for edge in edges if set(edge) <= modules.keys()]
    before = {name: [source for source, end in joined if end == name] for name in modules}
    order = list(TopologicalSorter(before).static_order())
    first, total = {}, 0
    for name in order:
        first[name] = total
        total += len(modules[name].stages)
    stages = []
    for name in order:
        own = modules[name].stages
        for stage in own[:-1]:
            stages.append(_pipeline_stage(stage, Hop(len(stages) + 1, stage.hop_s)))
        hops = [
            Hop(first[end], modules[end].entry_s or own[-1].hop_s)
            for source, end in joined
            if source == name
        ]
        stages.append(_pipeline_stage(own[-1], *hops))
    return stages


def _pipeline_stage(stage: StageCosts, *after: Hop) -> PipelineStage:
    return PipelineStage(stage.forward_s, stage.backward_s or None, after)


def _one_by_one_s(
    modules: Mapping[str, ModuleInStep], edges: Edges, num_microbatches: int
) -> float:
    """Time without pipelining: what comes before a microbatch's backward pass delays the next.

    A frozen encoder on ranks of its own waits for nothing and runs ahead.
    """
    language = modules[LANGUAGE]
    outputs = {end for source, end in edges if source == LANGUAGE}
    middle_s = _busy_s(language.stages[0])
    for name in outputs:
        module = modules[name]
        hops_s = 0.0 if module.shared else 2 * (module.entry_s or language.stages[-1].hop_s)
        middle_s += _busy_s(module.stages[0]) + hops_s
    forward_s = backward_s = ahead_s = slowest_ahead_s = 0.0
    shared_s = [0.0, 0.0]
    for name, module in modules.items():
        if name == LANGUAGE or name in outputs:
            continue
        stage = module.stages[0]
        hop_s = language.entry_s or stage.hop_s
        if module.shared:
            shared_s = [shared_s[0] + stage.forward_s, shared_s[1] + stage.backward_s]
        elif stage.backward_s:
            forward_s = max(forward_s, stage.forward_s + hop_s)
            backward_s = max(backward_s, stage.backward_s + hop_s)
        else:
            ahead_s = max(ahead_s, stage.forward_s + hop_s)
            slowest_ahead_s = max(slowest_ahead_s, stage.forward_s)
    forward_s, backward_s = max(forward_s, shared_s[0]), max(backward_s, shared_s[1])
    round_s = forward_s + middle_s + backward_s
    return max(
        num_microbatches * round_s + max(ahead_s - forward_s, 0.0),
        (num_microbatches - 1) * slowest_ahead_s + ahead_s + middle_s + backward_s,
    )
