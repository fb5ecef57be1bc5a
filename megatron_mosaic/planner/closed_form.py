"""Modules of a candidate with their stages: what they take together, on ranks that they share."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from operator import add
from typing import NamedTuple

from megatron_mosaic.cost.costs import (
    ModuleInStep,
    StageCosts,
    StepBreakdown,
)
from megatron_mosaic.cost.plan_memory import TERMS, memory_terms
from megatron_mosaic.cost.step import step_breakdown
from megatron_mosaic.layout.placement import LANGUAGE
from megatron_mosaic.layout.plan import ScheduleKind
from megatron_mosaic.planner.candidate import EncoderChoice, Host
from megatron_mosaic.schedule.graph import Stage


class Hosted(NamedTuple):
    """A module of a candidate with its stages.

    Args:
        choice: The encoder's; ``None`` for the language model.
        group: Microbatches of one task.
        layers_per_stage: Its split.
        stages: Its stages, for one task.
        live_tasks: Tasks between their passes, at most, of each stage.
        entry_s: Time of the transfer of a task's rows to the language model.
    """

    choice: EncoderChoice | None
    group: int
    layers_per_stage: tuple[int, ...]
    stages: tuple[StageCosts, ...]
    live_tasks: tuple[int, ...]
    entry_s: float = 0.0

    def held_bytes(self, stage: int) -> float:
        """Peak memory of a stage."""
        return self.stages[stage].memory.total(live_tasks=self.live_tasks[stage])

    @property
    def busy_s(self) -> float:
        """Time of one task in all stages, and of its transfer both ways."""
        ways = 2 if any(stage.backward_s for stage in self.stages) else 1
        return sum(stage.forward_s + stage.backward_s for stage in self.stages) + (
            ways * self.entry_s
        )


def closed_form(
    modules: Mapping[str, Hosted],
    *,
    kind: ScheduleKind,
    num_microbatches: int,
    encoder_group: int,
) -> StepBreakdown:
    """Brings every module to the two cases of the closed form: on all ranks, or apart.

    Args:
        modules: Modules of a candidate by name.
        kind: Schedule.
        num_microbatches: Of a step.
        encoder_group: Microbatches of an encoder's task with ``colocated``.
    """
    stages = list(modules[LANGUAGE].stages)
    in_step: dict[str, ModuleInStep] = {}
    together: list[StageCosts] = []
    for name, hosted in modules.items():
        host = hosted.choice.host if hosted.choice is not None else None
        if host == "together":
            together += apart_stages(hosted)
        elif host in ("first_stage", "replicated"):
            stages[0] = _on_first_stage(stages[0], hosted)
        if host is not None and (module := _in_step(name, hosted, host)) is not None:
            in_step[name] = module
    if together:
        in_step["together"] = ModuleInStep(name="together", stages=(_merged(together),))
    in_step[LANGUAGE] = ModuleInStep(name=LANGUAGE, stages=tuple(stages))
    return step_breakdown(
        in_step,
        edges=[(name, LANGUAGE) for name in in_step if name != LANGUAGE],
        kind=kind,
        num_microbatches=num_microbatches,
        encoder_group=encoder_group,
    )


def _on_first_stage(stage: StageCosts, hosted: Hosted) -> StageCosts:
    """The language model's first stage with what an encoder on its ranks adds to it."""
    if hosted.group == 1:
        return _merged([stage, *_task(hosted)])
    return _with_once(stage, hosted.stages)


def _in_step(name: str, hosted: Hosted, host: Host) -> ModuleInStep | None:
    """An encoder for whose tasks the pipeline pauses, or one apart; None if it is neither."""
    match host:
        case "language":
            return ModuleInStep(name=name, stages=_task(hosted), shared=True)
        case "first_stage" | "replicated" if hosted.group > 1:
            # While its first stage takes a group, the pipeline behind runs empty.
            tasks = tuple(replace(s, sync_s=0.0, optimizer_s=0.0) for s in _task(hosted))
            return ModuleInStep(name=name, stages=tasks, shared=True)
        case "apart":
            return ModuleInStep(
                name=name, stages=apart_stages(hosted), task_microbatches=hosted.group
            )
        case _:
            return None


def apart_stages(hosted: Hosted) -> tuple[StageCosts, ...]:
    """Stages on ranks of their own; the last one hands its rows to the language model."""
    return (*hosted.stages[:-1], replace(hosted.stages[-1], hop_s=hosted.entry_s))


def _task(hosted: Hosted) -> tuple[StageCosts, ...]:
    return (*hosted.stages[:-1], _with_entry(hosted.stages[-1], hosted.entry_s))


def _with_entry(stage: StageCosts, entry_s: float) -> StageCosts:
    """On shared ranks nothing else runs while rows change their layout."""
    back_s = entry_s if stage.backward_s else 0.0
    return replace(
        stage,
        forward_s=stage.forward_s + entry_s,
        backward_s=stage.backward_s + back_s,
        communication_s=stage.communication_s + entry_s + back_s,
    )


def _merged(stages: Sequence[StageCosts]) -> StageCosts:
    """Stages on the same ranks, one after the other."""
    return replace(
        stages[0],
        forward_s=sum(s.forward_s for s in stages),
        backward_s=sum(s.backward_s for s in stages),
        communication_s=sum(s.communication_s for s in stages),
        imbalance_s=sum(s.imbalance_s for s in stages),
        hop_s=max(s.hop_s for s in stages),
        sync_s=sum(s.sync_s for s in stages),
        optimizer_s=sum(s.optimizer_s for s in stages),
    )


def _with_once(stage: StageCosts, others: Sequence[StageCosts]) -> StageCosts:
    """A stage with what others on its ranks do once in a step."""
    return replace(
        stage,
        sync_s=stage.sync_s + max(s.sync_s for s in others),
        optimizer_s=stage.optimizer_s + max(s.optimizer_s for s in others),
    )


def memory_by_rank(
    modules: Mapping[str, Hosted],
) -> dict[tuple[Stage, ...], dict[str, float]]:
    """Bytes by term of every kind of rank, keyed by the stages that it hosts."""
    kinds: dict[tuple[Stage, ...], dict[str, float]] = {}
    language = modules[LANGUAGE]
    shared = [(n, h) for n, h in modules.items() if h.choice and h.choice.shares]
    for stage in range(len(language.stages)):
        hosted = [(LANGUAGE, language, stage)]
        hosted += [
            (name, other, 0)
            for name, other in shared
            if other.choice and (other.choice.host == "language" or stage == 0)
        ]
        kinds[tuple(Stage(name, at) for name, _, at in hosted)] = _terms(hosted)
    together = [(n, h, 0) for n, h in modules.items() if h.choice and h.choice.host == "together"]
    if together:
        kinds[tuple(Stage(name, 0) for name, _, _ in together)] = _terms(together)
    for name, other in modules.items():
        if other.choice and other.choice.host == "apart":
            for stage in range(len(other.stages)):
                kinds[(Stage(name, stage),)] = _terms([(name, other, stage)])
    return kinds


def _terms(hosted: Sequence[tuple[str, Hosted, int]]) -> dict[str, float]:
    terms: dict[str, float] = dict.fromkeys(TERMS, 0.0)
    for _, module, stage in hosted:
        memory, live = module.stages[stage].memory, module.live_tasks[stage]
        for term, held_bytes in memory_terms(memory, live_tasks=live).items():
            # What a task holds for a moment is gone before another module's task starts.
            together = max if term == "working" else add
            terms[term] = together(terms[term], held_bytes)
    return terms
