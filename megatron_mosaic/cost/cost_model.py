"""The cost model of one model on one cluster: what modules, stages and plans cost."""

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import replace
from functools import cache
from typing import NamedTuple

from megatron_mosaic.cluster.spec import Cluster
from megatron_mosaic.cost.boundary import boundary_s, rows_are_in_place
from megatron_mosaic.cost.collectives import Group, send_s
from megatron_mosaic.cost.context import ContextTask, context_loads
from megatron_mosaic.cost.costs import (
    ModuleCosts,
    PartRun,
    StageCosts,
    StageMemory,
    StepEstimate,
)
from megatron_mosaic.cost.imbalance import DrawnItems, items_vary, slowed
from megatron_mosaic.cost.lane_times import lane_times
from megatron_mosaic.cost.layer_split import even_split, split_runs
from megatron_mosaic.cost.memory import module_parts, stage_memory, with_memory
from megatron_mosaic.cost.model_flops import model_flops_per_token
from megatron_mosaic.cost.parts import module_costs
from megatron_mosaic.cost.plan_memory import ranks_memory, samples_per_task, task_microbatches
from megatron_mosaic.cost.plan_times import (
    Durations,
    StageInPlan,
    breakdown,
    durations,
    stages_in_plan,
)
from megatron_mosaic.cost.sizes import ParallelSizes, TrainingSettings
from megatron_mosaic.cost.spatial import gpu_with
from megatron_mosaic.cost.stages import StageWork, stage_costs
from megatron_mosaic.errors import PlanError
from megatron_mosaic.fields import show
from megatron_mosaic.layout.placement import LANGUAGE, ModulePlacement
from megatron_mosaic.layout.plan import Plan
from megatron_mosaic.model.spec import ModelSpec
from megatron_mosaic.model.workload import Workload
from megatron_mosaic.schedule.graph import Stage
from megatron_mosaic.schedule.lanes import has_lanes
from megatron_mosaic.schedule.plan_program import program_of_plan
from megatron_mosaic.schedule.simulate import LaneTimes, Pass, simulate


class _StageKey(NamedTuple):
    """What tells stages of a module under some sizes apart."""

    first: bool
    last: bool
    layers: tuple[tuple[int, int], ...]
    upstream: bool


class CostModel:
    """Costs of one model on one cluster.

    A module's parts cost the same for any number of replicas and stages, and stages with the same
    parts cost the same, so most questions have been answered before.

    Args:
        model: What is trained.
        cluster: On what.
        settings: What the run does alike for all modules.
    """

    def __init__(
        self, model: ModelSpec, cluster: Cluster, settings: TrainingSettings | None = None
    ) -> None:
        self.model, self.cluster = model, cluster
        self.settings = settings or TrainingSettings()
        self._parts: dict[tuple[str, ParallelSizes, float], ModuleCosts] = {}
        self._modules: dict[tuple[str, ParallelSizes, float], ModuleCosts] = {}
        self._stages: dict[int, tuple[ModuleCosts, dict[_StageKey, StageCosts]]] = {}
        self.workload = Workload.of(model)
        self._unlike = frozenset(
            name for name, it in model.modules.items() if name != LANGUAGE and items_vary(it)
        )
        self._items: dict[str, DrawnItems] = {}
        self._imbalances: dict[tuple[object, ...], float] = {}
        self._on: dict[tuple[int, float], CostModel] = {}
        self._trains_before = {name: self._upstream_trains(name) for name in model.modules}

    def trains_before(self, name: str) -> bool:
        """Whether anything upstream of a module trains, so that it has a gradient to pass on."""
        return self._trains_before[name]

    def _upstream_trains(self, name: str) -> bool:
        sources = [source for source, destination in self.model.edges if destination == name]
        return any(
            self.model.modules[source].trainable != () or self._upstream_trains(source)
            for source in sources
        )

    def module(self, name: str, sizes: ParallelSizes, *, samples: float) -> ModuleCosts:
        """Costs of a module for tasks of some samples of one replica."""
        key = (name, sizes, samples)
        known = self._modules.get(key)
        if known is None:
            parts = self._parts_of(name, sizes, samples)
            imbalance = self.imbalance(name, sizes, samples=samples)
            if imbalance > 1:
                parts = slowed(parts, imbalance=imbalance)
            known = replace(parts, sizes=sizes, hop_s=self._hop_s(parts, sizes))
            self._modules[key] = known
        return known

    def _parts_of(self, name: str, sizes: ParallelSizes, samples: float) -> ModuleCosts:
        # Tied embeddings alone care for stages: a second copy of them is on the last one.
        alike = replace(sizes, dp=1, pp=min(sizes.pp, 2), items="in_order")
        if sizes.cp == 1 or not (name == LANGUAGE and self.workload):
            alike = replace(alike, tokens="balanced", keys="auto")
        key = (name, alike, samples)
        known = self._parts.get(key)
        if known is None:
            known = self._parts[key] = self.count_parts(name, alike, samples)
        return known

    def count_parts(self, name: str, sizes: ParallelSizes, samples: float) -> ModuleCosts:
        """Counts a module's parts anew; all other costs follow from them."""
        module, context = self.model.modules[name], self.context(name, sizes, samples=samples)
        costs = module_costs(
            module,
            sizes=sizes,
            samples=samples,
            cluster=self.cluster,
            settings=self.settings,
            precision=self.model.precision,
            context=context,
        )
        held = module_parts(
            module,
            sizes=sizes,
            settings=self.settings,
            samples=samples,
            context=context,
            precision=self.model.precision,
            gradient_arrives=self.trains_before(name),
        )
        return with_memory(costs, held)

    def context(self, name: str, sizes: ParallelSizes, *, samples: float) -> ContextTask | None:
        """What a task brings to a context-parallel rank; ``None`` without a multimodal mask."""
        if name != LANGUAGE or self.workload is None:
            return None
        loads = context_loads(self.workload, cp=sizes.cp, method=sizes.tokens)
        return loads.of_microbatch(round(samples))

    def has_unlike_items(self, name: str) -> bool:
        """Whether samples of an encoder differ in number or size of their items."""
        return name in self._unlike

    def imbalance(self, name: str, sizes: ParallelSizes, *, samples: float) -> float:
        """Work of the slowest replica of a module over the mean of all, in its tasks.

        Args:
            name: The module.
            sizes: How it is split.
            samples: Samples of a task on one replica.
        """
        if sizes.dp == 1 or not self.has_unlike_items(name):
            return 1.0
        if name not in self._items:
            self._items[name] = DrawnItems.of(self.model.modules[name])
        key = (name, samples, sizes.dp, sizes.items)
        if key not in self._imbalances:
            self._imbalances[key] = self._items[name].imbalance(
                num_samples=round(samples) * sizes.dp, dp=sizes.dp, items=sizes.items
            )
        return self._imbalances[key]

    def _hop_s(self, parts: ModuleCosts, sizes: ParallelSizes) -> float:
        if sizes.pp == 1:
            return 0.0
        stage = Group.of(self.cluster, size=2, stride=sizes.tp * sizes.cp * sizes.dp)
        return send_s(stage.far, message_bytes=parts.hop_bytes)

    def stages(
        self, costs: ModuleCosts, layers_per_stage: Sequence[int] | None = None
    ) -> tuple[StageCosts, ...]:
        """Costs of a module's pipeline stages; ``None`` is an even split of its layers."""
        kept = self._stages.get(id(costs))
        if kept is None:
            kept = self._stages[id(costs)] = (costs, {})
        known = kept[1]
        split = layers_per_stage or even_split(costs.num_layers, costs.sizes.pp)
        stages, upstream = [], self._trains_before[costs.name]
        runs = [(run.count, index) for index, run in enumerate(costs.layers)]
        for number, layers in enumerate(split_runs(runs, split)):
            first, last = number == 0, number == len(split) - 1
            key = _StageKey(first, last, layers, upstream)
            if key not in known:
                known[key] = self._stage(costs, key)
            stages.append(known[key])
            upstream = upstream or (first and costs.input.trainable > 0)
            upstream = upstream or any(costs.layers[i].costs.trainable > 0 for _, i in layers)
        return tuple(stages)

    def _stage(self, costs: ModuleCosts, key: _StageKey) -> StageCosts:
        runs = [PartRun(count, costs.layers[index].costs) for count, index in key.layers]
        if key.first:
            runs.insert(0, PartRun(1, costs.input))
        if key.last:
            runs.append(PartRun(1, costs.output))
        parts = tuple(part for count, part in runs for _ in range(count))
        return stage_costs(
            StageWork(parts=parts, upstream=key.upstream),
            module=costs,
            cluster=self.cluster,
            settings=self.settings,
            precision=self.model.precision,
            memory=self.held(costs, *runs),
        )

    def held(self, costs: ModuleCosts, *runs: PartRun) -> StageMemory:
        """Memory of a stage that has these parts."""
        return stage_memory(
            runs, sizes=costs.sizes, settings=self.settings, precision=self.model.precision
        )

    def boundary_s(
        self,
        edge: tuple[str, str],
        source: ParallelSizes,
        destination: ParallelSizes,
        *,
        num_samples: int,
        same_ranks: bool,
    ) -> float:
        """Time to bring rows from one module to another, and as long for their gradient.

        Args:
            edge: The modules.
            source: Sizes of the one that makes the rows.
            destination: Sizes of the one that takes them.
            num_samples: Samples of the task, of all replicas.
            same_ranks: Whether the rows are made on the ranks that take them, place by place.
        """
        in_place = same_ranks and source.items == "in_order"
        if in_place and rows_are_in_place(source, destination):
            return 0.0
        modules = self.model.modules
        rows_bytes = 2 * modules[edge[0]].rows_per_sample * modules[edge[1]].hidden_size
        return boundary_s(
            num_samples * rows_bytes, source=source, destination=destination, cluster=self.cluster
        )

    def plan_stages(self, plan: Plan) -> dict[str, tuple[StageCosts, ...]]:
        """Costs of all stages of a plan, by module.

        Raises:
            PlanError: The plan is one for another model.
        """
        for placement in plan.modules.values():
            self._check(placement)
        return {name: self.module_stages(plan, name) for name in plan.modules}

    def module_stages(self, plan: Plan, name: str) -> tuple[StageCosts, ...]:
        """Costs of the stages of one module of a plan."""
        placement = plan.modules[name]
        sizes = ParallelSizes.of(placement)
        costs = self.module(name, sizes, samples=samples_per_task(plan, name))
        split = placement.layers_per_stage
        return self.stages(costs, split or even_split(costs.num_layers, placement.num_stages))

    def on(self, *, sms: int, bandwidth_share: float = 1.0) -> "CostModel":
        """The same costs where modules have only a part of each GPU.

        Args:
            sms: Multiprocessors.
            bandwidth_share: Part of the memory's bandwidth that these would otherwise have.

        Raises:
            PlanError: It is not known how the GPU does with some of its multiprocessors.
        """
        gpu = gpu_with(self.cluster.gpu, sms=sms, bandwidth_share=bandwidth_share)
        if gpu is self.cluster.gpu:
            return self
        key = (sms, bandwidth_share)
        if key not in self._on:
            slower = copy(self)
            slower.cluster = replace(self.cluster, gpu=gpu)
            slower._parts, slower._modules, slower._stages, slower._on = {}, {}, {}, {}
            self._on[key] = slower
        return self._on[key]

    def _check(self, placement: ModulePlacement) -> None:
        where, name = f"model {self.model.name}", placement.name
        if name not in self.model.modules:
            raise PlanError(
                f"{where}: module={name} must be one of {', '.join(self.model.modules)}; take the "
                f"plan's own model"
            )
        module = self.model.modules[name]
        if module.trainable != placement.trainable:
            raise PlanError(
                f"modules.{name}: trainable={show(_listed(placement.trainable))} must be "
                f"{show(_listed(module.trainable))} as in {where}; change one of them"
            )
        if name == LANGUAGE:
            self._check_mask(placement)
        num_layers = sum(placement.layers_per_stage or (module.num_layers,))
        if num_layers != module.num_layers:
            raise PlanError(
                f"modules.{name}: layers_per_stage={list(placement.layers_per_stage or ())} must "
                f"add up to the {module.num_layers} layers of {where}; change one of them"
            )

    def _check_mask(self, placement: ModulePlacement) -> None:
        """Checks that a plan has the model's mask; without one both attend causally."""
        expected = self.workload.mask if self.workload else "causal"
        mask = placement.attention.mask if placement.attention else "causal"
        if mask != expected:
            raise PlanError(
                f"modules.{LANGUAGE}: attention.mask={mask} must be {expected} as in model "
                f"{self.model.name}; change one of them"
            )

    def plan_boundaries_s(self, plan: Plan) -> dict[tuple[str, str], float]:
        """Time to bring a task's rows over every edge of a plan."""
        return {edge: self._plan_boundary_s(plan, edge) for edge in plan.edges}

    def _plan_boundary_s(self, plan: Plan, edge: tuple[str, str]) -> float:
        source, destination = (plan.modules[name] for name in edge)
        samples = plan.micro_batch_size * plan.language.data_parallel_size
        made = source.stage_ranks(source.num_stages - 1)
        taken = destination.stage_ranks(0)
        if source.context_parallel_size == 1:
            tp, cp = destination.tensor_model_parallel_size, destination.context_parallel_size
            taken = tuple(rank for place, rank in enumerate(taken) if place // tp % cp == 0)
        return self.boundary_s(
            edge,
            ParallelSizes.of(source),
            ParallelSizes.of(destination),
            num_samples=samples * task_microbatches(plan, edge[0]),
            same_ranks=made == taken,
        )

    def plan_memory(self, plan: Plan) -> dict[tuple[Stage, ...], dict[str, float]]:
        """Bytes by term of every kind of rank, keyed by the stages that it hosts."""
        return ranks_memory(
            plan,
            {
                name: [stage.memory for stage in stages]
                for name, stages in self.plan_stages(plan).items()
            },
        )

    def plan_durations(self, plan: Plan) -> Durations:
        """Times of a plan's tasks and transfers, as a simulation takes them."""
        costs = self.plan_stages(plan)
        boundaries_s = self.plan_boundaries_s(plan)
        stages = stages_in_plan(plan, costs, boundaries_s)
        return durations(plan, stages, boundaries_s, lanes=self._lane_times(plan, stages))

    def _lane_times(self, plan: Plan, stages: Mapping[Stage, StageInPlan]) -> LaneTimes | None:
        if not has_lanes(plan):
            return None

        @cache
        def stages_on(name: str, sms: int, bandwidth_share: float) -> tuple[StageCosts, ...]:
            return self.on(sms=sms, bandwidth_share=bandwidth_share).module_stages(plan, name)

        def pass_s(work: Pass, sms: int, bandwidth_share: float) -> float:
            name, number = work.stage
            costs = stages_on(name, sms, bandwidth_share)[number]
            return stages[work.stage]._replace(costs=costs).passes_s[work.backward]

        return lane_times(plan, stages, gpu=self.cluster.gpu, pass_s=pass_s)

    def estimate(self, plan: Plan) -> StepEstimate:
        """Estimates a step of a plan: simulates its schedule, and adds what happens once."""
        costs = self.plan_stages(plan)
        boundaries_s = self.plan_boundaries_s(plan)
        stages = stages_in_plan(plan, costs, boundaries_s)
        lanes = self._lane_times(plan, stages)
        times = durations(plan, stages, boundaries_s, lanes=lanes)
        timeline = simulate(program_of_plan(plan), **times._asdict())
        return StepEstimate(
            breakdown=breakdown(plan, stages, timeline),
            memory=self.plan_memory(plan),
            flops=self.step_flops(num_samples=plan.global_batch_size),
            num_gpus=plan.world_size,
        )

    def step_flops(self, *, num_samples: int) -> float:
        """Model FLOPs of a step, without what is computed again."""
        return num_samples * sum(
            model_flops_per_token(module) * module.tokens_per_sample
            for module in self.model.modules.values()
        )


def _listed(trainable: tuple[str, ...] | None) -> list[str] | None:
    """As plans write it."""
    return None if trainable is None else list(trainable)
