"""Time of a step in closed form, from what its stages cost."""

from collections.abc import Mapping, Sequence

from megatron_mosaic.cost.costs import ModuleInStep, StageCosts, StepBreakdown
from megatron_mosaic.layout.plan import ScheduleKind


def step_breakdown(
    modules: Mapping[str, ModuleInStep],
    *,
    edges: Sequence[tuple[str, str]],
    kind: ScheduleKind,
    num_microbatches: int,
    encoder_group: int | None = None,
) -> StepBreakdown:
    """Estimates a step.

    Args:
        modules: All modules of the plan; ``"language"`` is one of them.
        edges: Pairs of source and destination module.
        kind: Schedule.
        num_microbatches: Microbatches of the step.
        encoder_group: Microbatches of one encoder task with ``colocated``; None is all of them.
    """
    language = modules["language"]
    encoders = [module for name, module in modules.items() if name != "language"]
    group = (encoder_group or num_microbatches) if kind == "colocated" else 1
    path = [*language.stages]
    if encoders and not all(module.shared for module in encoders):
        longest = max(encoders, key=lambda module: sum(map(_busy_s, module.stages)))
        path = [*longest.stages, *path]
    slowest = max(path, key=_busy_s)
    work_s = num_microbatches * _busy_s(slowest)
    bubble_s = (sum(map(_busy_s, path)) - _busy_s(slowest)) / language.chunks
    bubble_s += 2 * sum(s.hop_s for s in path)
    shared = [stage for module in encoders if module.shared for stage in module.stages]
    work_s += sum(map(_busy_s, shared)) * num_microbatches / group
    communication_s = num_microbatches * slowest.communication_s
    return StepBreakdown(
        compute_s=work_s - communication_s,
        communication_s=communication_s,
        bubble_s=bubble_s,
        sync_s=max(stage.sync_s for stage in path),
        optimizer_s=max(stage.optimizer_s for stage in path),
    )


def _busy_s(stage: StageCosts) -> float:
    return stage.forward_s + stage.backward_s
