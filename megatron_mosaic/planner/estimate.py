"""What a candidate costs: the one function that search, tests and explanation rank by."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import ceil, inf

from megatron_mosaic.cost.cost_model import CostModel
from megatron_mosaic.cost.costs import (
    ModuleCosts,
    ModuleInStep,
    PartCosts,
    PartRun,
    StageCosts,
    StepBreakdown,
)
from megatron_mosaic.cost.sizes import ParallelSizes
from megatron_mosaic.cost.step import step_breakdown
from megatron_mosaic.layout.placement import LANGUAGE
from megatron_mosaic.planner.candidate import Candidate, EncoderChoice
from megatron_mosaic.planner.closed_form import Hosted, apart_stages, closed_form, memory_by_rank
from megatron_mosaic.planner.partition import NOTHING, Chain, Load, Room, chain_of, split_layers
from megatron_mosaic.planner.problem import Problem
from megatron_mosaic.schedule.graph import Stage

_Made = tuple[tuple[int, ...], tuple[StageCosts, ...]]
"""Layers of each stage, and the stages."""


@dataclass(frozen=True)
class Estimate:
    """A candidate with its costs.

    Args:
        candidate: The layout.
        num_microbatches: Of a step.
        modules: Its modules by name.
        num_gpus: GPUs of the run.
    """

    candidate: Candidate
    num_microbatches: int
    modules: Mapping[str, Hosted]
    num_gpus: int

    @cached_property
    def breakdown(self) -> StepBreakdown:
        """Where the time goes."""
        return closed_form(
            self.modules,
            kind=self.candidate.kind,
            num_microbatches=self.num_microbatches,
            encoder_group=self.candidate.encoder_group,
        )

    @property
    def step_s(self) -> float:
        """Seconds of a step."""
        return self.breakdown.step_s

    @cached_property
    def memory(self) -> dict[tuple[Stage, ...], dict[str, float]]:
        """Bytes by term of every kind of rank."""
        return memory_by_rank(self.modules)

    @property
    def peak_bytes(self) -> float:
        """Of the fullest rank."""
        return max(sum(terms.values()) for terms in self.memory.values())

    @property
    def layers_per_stage(self) -> dict[str, tuple[int, ...]]:
        """Split of every module."""
        return {name: hosted.layers_per_stage for name, hosted in self.modules.items()}


class Estimator:
    """Estimates candidates of one problem.

    Args:
        problem: What is asked.
        cost_model: What things cost.
    """

    def __init__(self, problem: Problem, cost_model: CostModel) -> None:
        self.problem, self.cost_model = problem, cost_model
        self.limit_bytes = problem.memory_bytes
        self._hosted: dict[tuple[object, ...], Hosted | None] = {}
        self._chains: dict[int, tuple[ModuleCosts, Chain]] = {}
        self._languages: dict[tuple[object, ...], tuple[ModuleCosts, _Made | None]] = {}

    def estimate(
        self, candidate: Candidate, *, limit_bytes: float | None = None
    ) -> Estimate | None:
        """Estimates a candidate.

        Args:
            candidate: The layout.
            limit_bytes: Memory of a rank; ``None`` is the GPU's.

        Returns:
            The estimate, or None if no split of its layers fits the memory.
        """
        limit = self.limit_bytes if limit_bytes is None else limit_bytes
        num_microbatches = self.problem.num_microbatches(
            micro_batch_size=candidate.micro_batch_size, dp=candidate.language.dp
        )
        encoders: dict[str, Hosted] = {}
        for choice in candidate.encoders:
            hosted = self.encoder(candidate, choice, num_microbatches, limit_bytes=limit)
            if hosted is None:
                return None
            encoders[choice.name] = hosted
        language = self.language(candidate, encoders, num_microbatches, limit_bytes=limit)
        if language is None:
            return None
        estimate = Estimate(
            candidate=candidate,
            num_microbatches=num_microbatches,
            modules={**encoders, LANGUAGE: language},
            num_gpus=self.problem.num_gpus,
        )
        return estimate if estimate.peak_bytes <= limit else None

    def encoder(
        self,
        candidate: Candidate,
        choice: EncoderChoice,
        num_microbatches: int,
        *,
        limit_bytes: float,
    ) -> Hosted | None:
        """Returns an encoder with its stages, or None if it does not fit a rank even alone."""
        language, group = candidate.language, candidate.encoder_group
        num_samples = group * candidate.micro_batch_size * language.dp
        live = _live_tasks(candidate, choice, num_microbatches)
        key = (choice, num_samples, live, limit_bytes)
        if key not in self._hosted:
            costs = self.encoder_costs(choice, num_samples)
            made = self._split(costs, live, limit_bytes)
            self._hosted[key] = None if made is None else Hosted(choice, group, *made, live)
        hosted = self._hosted[key]
        if hosted is None:
            return None
        entry_s = self.entry_s(choice, language, num_samples=num_samples)
        return hosted._replace(group=group, entry_s=entry_s)

    def entry_s(self, choice: EncoderChoice, language: ParallelSizes, *, num_samples: int) -> float:
        """Time in which the rows of an encoder's task reach the language model."""
        return self.cost_model.boundary_s(
            (choice.name, LANGUAGE),
            choice.sizes,
            language,
            num_samples=num_samples,
            same_ranks=_same_ranks(choice, language),
        )

    def pipeline_s(
        self, language: Hosted, num_microbatches: int, *, encoder: Hosted | None = None
    ) -> float:
        """Time of the language model's pipeline, without what happens once in a step.

        Args:
            language: Its stages.
            num_microbatches: Of the step.
            encoder: One on ranks of its own that feeds it.
        """
        modules = {LANGUAGE: ModuleInStep(name=LANGUAGE, stages=language.stages)}
        edges: list[tuple[str, str]] = []
        if encoder is not None and encoder.choice is not None:
            name = encoder.choice.name
            modules[name] = ModuleInStep(
                name=name, stages=apart_stages(encoder), task_microbatches=encoder.group
            )
            edges.append((name, LANGUAGE))
        grouped = encoder is not None and encoder.group > 1
        breakdown = step_breakdown(
            modules,
            edges=edges,
            kind="colocated" if grouped else "1f1b",
            num_microbatches=num_microbatches,
            encoder_group=encoder.group if encoder and grouped else None,
        )
        return breakdown.compute_s + breakdown.communication_s + breakdown.bubble_s

    def encoder_costs(self, choice: EncoderChoice, num_samples: int) -> ModuleCosts:
        """Costs of an encoder for tasks of some samples of all its replicas."""
        samples = ceil(num_samples / choice.sizes.dp)
        return self.cost_model.module(choice.name, choice.sizes, samples=samples)

    def language(
        self,
        candidate: Candidate,
        encoders: Mapping[str, Hosted],
        num_microbatches: int,
        *,
        limit_bytes: float,
    ) -> Hosted | None:
        """Returns the language model with its stages, split around what shares its ranks."""
        sizes = candidate.language
        costs = self.cost_model.module(LANGUAGE, sizes, samples=candidate.micro_batch_size)
        everywhere, first = 0.0, NOTHING
        for hosted in encoders.values():
            assert hosted.choice is not None
            if hosted.choice.host == "language":
                everywhere += hosted.held_bytes(0)
            elif hosted.choice.shares:
                time_s = hosted.busy_s if hosted.group == 1 else 0.0
                first = Load(first.time_s + time_s, first.fixed_bytes + hosted.held_bytes(0))
        live = tuple(
            1 if candidate.kind == "no_pipelining" else min(num_microbatches, sizes.pp - stage)
            for stage in range(sizes.pp)
        )
        made = self._alone(costs, live, limit_bytes) if first == NOTHING else None
        held_bytes = -inf if made is None else _fullest_bytes(made[1], live)
        if made is None or held_bytes + everywhere > limit_bytes:
            made = self._split(
                costs,
                live,
                limit_bytes - everywhere,
                first=first,
            )
        return None if made is None else Hosted(None, 1, *made, live)

    def _alone(
        self, costs: ModuleCosts, live: tuple[int, ...], limit_bytes: float
    ) -> "_Made | None":
        """The language model's stages as if nothing else were on its ranks.

        Where an encoder leaves room for them they are as good as any, so most candidates around
        the same language model have the same split.
        """
        key = (id(costs), live, limit_bytes)
        if key not in self._languages:
            made = self._split(costs, live, limit_bytes)
            self._languages[key] = (costs, made)
        return self._languages[key][1]

    def _split(
        self,
        costs: ModuleCosts,
        live: tuple[int, ...],
        room_bytes: float,
        *,
        first: Load = NOTHING,
    ) -> "_Made | None":
        """Splits a module; a split that the user has pinned is taken as it is."""
        pinned = self.problem.pins.modules.get(costs.name, {})
        layers_per_stage: tuple[int, ...] = pinned.get("layers_per_stage", ())
        if not layers_per_stage:
            chain = self._chain(costs)
            whole = Load(*(a + b for a, b in zip(chain.input, first, strict=True)))
            split = split_layers(
                replace(chain, input=whole),
                num_stages=len(live),
                room=Room(num_bytes=room_bytes - self._passing_bytes(costs), live_tasks=live),
            )
            if split is None:
                return None
            layers_per_stage = split.layers_per_stage
        stages = self.cost_model.stages(costs, layers_per_stage)
        return layers_per_stage, stages

    def _chain(self, costs: ModuleCosts) -> Chain:
        known = self._chains.get(id(costs))
        if known is not None and known[0] is costs:
            return known[1]
        times, input_s, output_s = chain_of(
            costs, trainable_upstream=self.cost_model.trains_before(costs.name)
        )
        layers: list[Load] = []
        for run in costs.layers:
            load = self._load(costs, run.costs)
            layers += [
                load._replace(time_s=s) for s in times[len(layers) : len(layers) + run.count]
            ]
        output = self._load(costs, costs.output)
        # What the last stage holds for a moment may be more than what layers do.
        more = self.cost_model.held(costs, PartRun(1, costs.output)).working
        more = max(0.0, more - self._passing_bytes(costs))
        chain = Chain(
            input=self._load(costs, costs.input)._replace(time_s=input_s),
            layers=tuple(layers),
            output=output._replace(time_s=output_s, fixed_bytes=output.fixed_bytes + more),
        )
        self._chains[id(costs)] = (costs, chain)
        return chain

    def _passing_bytes(self, costs: ModuleCosts) -> float:
        """What a stage holds for a moment, and what libraries hold, whatever its layers."""
        held = self.cost_model.held(costs, *(PartRun(1, run.costs) for run in costs.layers))
        return held.working + held.buffers

    def _load(self, costs: ModuleCosts, part: PartCosts) -> Load:
        held = self.cost_model.held(costs, PartRun(1, part))
        fixed = held.weights + held.gradients + held.optimizer
        return Load(0.0, fixed, held.activations_per_task)


def _fullest_bytes(stages: Sequence[StageCosts], live: Sequence[int]) -> float:
    return max(s.memory.total(live_tasks=n) for s, n in zip(stages, live, strict=True))


def _same_ranks(choice: EncoderChoice, language: ParallelSizes) -> bool:
    """Whether an encoder runs on the language model's first stage, place by place."""
    whole = choice.host == "language" and language.pp == 1
    return whole or choice.host in ("first_stage", "replicated")


def _live_tasks(
    candidate: Candidate, choice: EncoderChoice, num_microbatches: int
) -> tuple[int, ...]:
    """Tasks of an encoder between their passes; the same rules as the schedules' ``max_live``."""
    stages, depth = choice.sizes.pp, candidate.language.pp
    match candidate.kind:
        case "no_pipelining":
            return (1,) * stages
        case "1f1b":
            return tuple(min(num_microbatches, depth + stages - j) for j in range(stages))
        case "colocated":
            group = candidate.encoder_group
            ahead = 0 if choice.shares else 1
            live = 1 + ceil((depth - 1) / group) + ahead
            return (min(num_microbatches // group, live),) * stages
        case "interleaved" | "bubble_fill" | "concurrent":
            raise AssertionError(f"{candidate.kind} has no closed form")
