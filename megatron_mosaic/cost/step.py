"""Time of a step in closed form, from what its stages cost."""

from collections.abc import Mapping, Sequence
from graphlib import TopologicalSorter
from typing import NamedTuple

from megatron_mosaic.cost.costs import ModuleInStep, StageCosts, StepBreakdown
from megatron_mosaic.cost.groups import grouped_s
from megatron_mosaic.cost.pauses import paused_pipeline_s
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
    language model's ranks makes the whole pipeline pause for each of its tasks. Against the
    simulator (``benchmarks/step_deviation.py``) nine of ten random plans are exact to 1 % and all
    to 4 %, with transfers of up to a tenth of a forward pass; most that are not are too fast.

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
        _Pause(module, num_microbatches / (module.task_microbatches or group))
        for module in modules.values()
        if module.shared
    ]
    if kind == "no_pipelining":
        total_s = _one_by_one_s(modules, edges, num_microbatches)
    else:
        grouped = kind == "colocated"
        total_s = _pausing_s(modules, edges, pauses, num_microbatches, grouped=grouped, group=group)
    busy_s, communication_s, imbalance_s = _busiest_rank_s(modules, pauses, num_microbatches)
    return StepBreakdown(
        compute_s=busy_s - communication_s - imbalance_s,
        imbalance_s=imbalance_s,
        communication_s=communication_s,
        bubble_s=max(total_s - busy_s, 0.0),
        sync_s=_once_s(modules, "sync_s"),
        optimizer_s=_once_s(modules, "optimizer_s"),
    )


class _Pause(NamedTuple):
    """A module for whose tasks the language model's ranks pause."""

    module: ModuleInStep
    num_tasks: float


def _busy_s(stage: StageCosts) -> float:
    return stage.forward_s + stage.backward_s


def _busiest_rank_s(
    modules: Mapping[str, ModuleInStep], pauses: Sequence[_Pause], num_microbatches: int
) -> tuple[float, float, float]:
    """Time that the busiest rank works, and how much of that is communication and imbalance.

    That rank is where a step's time is counted: what it does not work, it waits.
    """
    busiest = 0.0, 0.0, 0.0
    for name, module in modules.items():
        if module.shared:
            continue
        num_tasks = num_microbatches / (module.task_microbatches or 1)
        stage = max(module.stages, key=_busy_s)
        own = [(stage, num_tasks)]
        if name == LANGUAGE:
            own += [(stage, count) for shared, count in pauses for stage in shared.stages]
        work_s = sum(count * _busy_s(stage) for stage, count in own)
        communication_s = sum(count * stage.communication_s for stage, count in own)
        imbalance_s = sum(count * stage.imbalance_s for stage, count in own)
        busiest = max(busiest, (work_s, communication_s, imbalance_s))
    return busiest


def _pausing_s(
    modules: Mapping[str, ModuleInStep],
    edges: Edges,
    pauses: Sequence[_Pause],
    num_microbatches: int,
    *,
    grouped: bool,
    group: int,
) -> float:
    """Time of a pipeline that pauses for modules on its ranks, if there are any."""
    if _can_pause(modules, edges, group):
        paused_s = paused_pipeline_s(modules, group=group, num_microbatches=num_microbatches)
        if paused_s is not None:
            return paused_s
    apart = {name: module for name, module in modules.items() if not module.shared}
    total_s = _pipelined_s(apart, edges, num_microbatches, grouped=grouped)
    return total_s + sum(_paused_s(pause, modules[LANGUAGE], num_microbatches) for pause in pauses)


def _can_pause(modules: Mapping[str, ModuleInStep], edges: Edges, group: int) -> bool:
    """Whether a pipeline of several stages pauses for encoders with tasks of one size."""
    language = modules[LANGUAGE]
    encoders = [module for name, module in modules.items() if name != LANGUAGE]
    sizes = {m.task_microbatches or (group if m.shared else 1) for m in encoders}
    return (
        any(module.shared for module in encoders)
        and len(language.stages) > 1
        and language.chunks == 1
        and sizes == {group}
        and all(end == LANGUAGE for _, end in edges)
        and all(len(module.stages) == 1 for module in encoders if module.shared)
    )


def _paused_s(pause: _Pause, language: ModuleInStep, num_microbatches: int) -> float:
    """Time of a module's tasks, and in which its ranks wait for the first row of each of them."""
    module, num_tasks = pause
    last = module.stages[-1]
    hop_s = language.entry_s or last.hop_s * num_tasks / num_microbatches
    gap_s = hop_s * (2 if last.backward_s else 1)
    return num_tasks * (sum(map(_busy_s, module.stages)) + gap_s)


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


def _pipelined_s(
    modules: Mapping[str, ModuleInStep], edges: Edges, num_microbatches: int, *, grouped: bool
) -> float:
    """Time of modules on ranks of their own; encoders may be ahead by a group of microbatches."""
    chunks = modules[LANGUAGE].chunks
    encoders = [modules[source] for source, end in edges if end == LANGUAGE and source in modules]
    ahead = encoders if grouped else []
    names = {module.name for module in ahead}
    stages = _joint_stages({n: m for n, m in modules.items() if n not in names}, edges)

    def joint_s(count: int) -> float:
        if chunks > 1:
            return interleaved_s(stages, chunks=chunks, num_microbatches=count)
        return pipeline_s(stages, num_microbatches=count)

    total_s = all_s = joint_s(num_microbatches)
    ways_s = []
    for module in ahead:
        per_task = module.task_microbatches or 1
        entry_s = modules[LANGUAGE].entry_s or module.stages[-1].hop_s
        hops_s = [*(stage.hop_s for stage in module.stages[:-1]), entry_s]
        limited_s = grouped_s(
            [_pipeline_stage(stage) for stage in module.stages],
            hops_s=hops_s,
            rest_s=(joint_s(min(per_task, num_microbatches)), all_s),
            num_tasks=-(-num_microbatches // per_task),
            depth=-(-(len(modules[LANGUAGE].stages) - 1) // per_task),
        )
        total_s = max(total_s, limited_s)
        back_s = sum(stage.backward_s for stage in module.stages)
        there_s = sum(stage.forward_s for stage in module.stages) + sum(hops_s)
        ways_s.append((there_s, back_s + sum(hops_s) if back_s else 0.0))
    if ways_s:
        # The way there and the way back may be through two encoders.
        there_s, back_s = (max(column) for column in zip(*ways_s, strict=True))
        total_s = max(total_s, there_s + all_s + back_s)
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
    encoders = [m for name, m in sorted(modules.items()) if name not in {LANGUAGE, *outputs}]
    forward_s, backward_s = _shared_passes_s([m for m in encoders if m.shared], language.entry_s)
    ahead_s = slowest_ahead_s = 0.0
    for module in (m for m in encoders if not m.shared):
        stage = module.stages[0]
        there_s = stage.forward_s + (language.entry_s or stage.hop_s)
        if stage.backward_s:
            forward_s = max(forward_s, there_s)
            backward_s = max(backward_s, there_s - stage.forward_s + stage.backward_s)
        else:
            ahead_s = max(ahead_s, there_s)
            slowest_ahead_s = max(slowest_ahead_s, stage.forward_s)
    round_s = forward_s + middle_s + backward_s
    return max(
        num_microbatches * round_s + max(ahead_s - forward_s, 0.0),
        (num_microbatches - 1) * slowest_ahead_s + ahead_s + middle_s + backward_s,
    )


def _shared_passes_s(encoders: Sequence[ModuleInStep], entry_s: float) -> tuple[float, float]:
    """Time of encoders on the same ranks until all have given, and then got back, a microbatch."""
    forward_s = backward_s = arrival_s = 0.0
    for module in encoders:
        forward_s += module.stages[0].forward_s
        arrival_s = max(arrival_s, forward_s + (entry_s or module.stages[0].hop_s))
    for module in reversed(encoders):
        if module.stages[0].backward_s:
            backward_s = max(backward_s, entry_s or module.stages[0].hop_s)
            backward_s += module.stages[0].backward_s
    return arrival_s, backward_s
