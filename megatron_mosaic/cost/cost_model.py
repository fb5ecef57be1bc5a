"""The cost model of one model on one cluster: what plans cost, with the costs of modules kept."""

from collections.abc import Mapping, Sequence

from megatron_mosaic.cluster.spec import Cluster
from megatron_mosaic.cost.collectives import Group, send_s
from megatron_mosaic.cost.costs import (
    HostedStage,
    ModuleCosts,
    ModuleInStep,
    StageCosts,
    StepEstimate,
)
from megatron_mosaic.cost.memory import ModuleParts, module_parts, stages_memory, with_memory
from megatron_mosaic.cost.model_flops import model_flops_per_token
from megatron_mosaic.cost.parts import module_costs
from megatron_mosaic.cost.plan_memory import (
    live_in_step,
    memory_terms,
    ranks_memory,
    samples_per_task,
)
from megatron_mosaic.cost.sizes import ParallelSizes, TrainingSettings
from megatron_mosaic.cost.stages import stage_costs, stage_works
from megatron_mosaic.cost.step import step_breakdown
from megatron_mosaic.layout.placement import LANGUAGE
from megatron_mosaic.layout.plan import Plan, ScheduleChoice
from megatron_mosaic.model.spec import ModelSpec


class CostModel:
    """Estimates plans for one model on one cluster.

    Args:
        model: What is trained.
        cluster: On what.
        settings: What the run does the same for all modules.
    """

    def __init__(
        self, model: ModelSpec, cluster: Cluster, settings: TrainingSettings | None = None
    ) -> None:
        self.model = model
        self.cluster = cluster
        self.settings = settings or TrainingSettings()
        self._modules: dict[tuple[str, ParallelSizes, float], ModuleCosts] = {}
        self._flops: dict[str, float] = {}
        self._stages: dict[tuple[object, ...], tuple[StageCosts, ...]] = {}

    def module(self, name: str, sizes: ParallelSizes, *, samples_per_task: float) -> ModuleCosts:
        """Costs of a module's parts under some sizes, for a task of some samples."""
        key = (name, sizes, samples_per_task)
        if (known := self._modules.get(key)) is None:
            module, precision = self.model.modules[name], self.model.precision
            costs = module_costs(
                module,
                sizes=sizes,
                samples=samples_per_task,
                cluster=self.cluster,
                settings=self.settings,
                precision=precision,
            )
            held = module_parts(
                module,
                sizes=sizes,
                settings=self.settings,
                samples=samples_per_task,
                precision=precision,
                gradient_arrives=self.trains_before(name),
            )
            known = self._modules[key] = with_memory(costs, held)
        return known

    def stages(
        self,
        name: str,
        sizes: ParallelSizes,
        *,
        samples_per_task: float,
        layers_per_stage: Sequence[int] | None = None,
    ) -> tuple[StageCosts, ...]:
        """Costs of a module's pipeline stages; an even split where none is given."""
        split = tuple(layers_per_stage or even_split(self.model.modules[name].num_layers, sizes.pp))
        key = (name, sizes, samples_per_task, split)
        if (known := self._stages.get(key)) is None:
            module = self.module(name, sizes, samples_per_task=samples_per_task)
            works = stage_works(module, layers_per_stage=split, upstream=self.trains_before(name))
            held = stages_memory(
                ModuleParts(module.input, module.layers, module.output),
                sizes=sizes,
                settings=self.settings,
                precision=self.model.precision,
                layers_per_stage=split,
            )
            known = self._stages[key] = tuple(
                stage_costs(
                    work,
                    module=module,
                    cluster=self.cluster,
                    settings=self.settings,
                    precision=self.model.precision,
                    memory=memory,
                )
                for work, memory in zip(works, held, strict=True)
            )
        return known

    def trains_before(self, name: str) -> bool:
        """Whether anything upstream of a module trains."""
        sources = [source for source, target in self.model.edges if target == name]
        return any(
            self.model.modules[source].trainable != () or self.trains_before(source)
            for source in sources
        )

    def flops_per_sample(self, name: str) -> float:
        """Model FLOPs of a module's training step by sample."""
        if (known := self._flops.get(name)) is None:
            module = self.model.modules[name]
            known = model_flops_per_token(module) * module.tokens_per_sample
            self._flops[name] = known
        return known

    def estimate(self, plan: Plan) -> StepEstimate:
        """Estimates a step of a plan in closed form."""
        sizes = {name: ParallelSizes.of(placement) for name, placement in plan.modules.items()}
        language_ranks = set(plan.modules[LANGUAGE].ranks)
        modules = self._modules_in_step(
            sizes,
            num_samples=plan.global_batch_size,
            num_microbatches=plan.num_microbatches,
            schedule=plan.schedule,
            layers_per_stage={
                name: placement.layers_per_stage for name, placement in plan.modules.items()
            },
            shared={
                name: not language_ranks.isdisjoint(placement.ranks)
                for name, placement in plan.modules.items()
            },
        )
        held = {
            name: [
                stage.memory
                for stage in self.stages(
                    name,
                    sizes[name],
                    samples_per_task=samples_per_task(plan, name),
                    layers_per_stage=plan.modules[name].layers_per_stage,
                )
            ]
            for name in plan.modules
        }
        return self._estimate(
            modules,
            schedule=plan.schedule,
            num_microbatches=plan.num_microbatches,
            num_samples=plan.global_batch_size,
            num_gpus=plan.world_size,
            memory=ranks_memory(plan, held),
        )

    def estimate_sizes(
        self,
        sizes: Mapping[str, ParallelSizes],
        *,
        micro_batch_size: int,
        global_batch_size: int,
        schedule: ScheduleChoice,
        num_gpus: int,
        layers_per_stage: Mapping[str, Sequence[int] | None] | None = None,
        shared: Mapping[str, bool] | None = None,
    ) -> StepEstimate:
        """Estimates a step from parallel sizes, which need not make a whole plan.

        Args:
            sizes: Of every module.
            micro_batch_size: Samples of a microbatch of one replica of the language model.
            global_batch_size: Samples of the step.
            schedule: Order of work.
            num_gpus: GPUs of the run, idle ones too.
            layers_per_stage: Where a split is not even.
            shared: Whether a module's ranks also host the language model; no if absent.

        Note:
            Memory is that of each stage alone: what shares a rank is known to plans only.
        """
        num_microbatches = global_batch_size // (micro_batch_size * sizes[LANGUAGE].dp)
        modules = self._modules_in_step(
            sizes,
            num_samples=global_batch_size,
            num_microbatches=num_microbatches,
            schedule=schedule,
            layers_per_stage=layers_per_stage or {},
            shared=shared or {},
        )
        memory = {
            (HostedStage(name, stage),): memory_terms(
                costs.memory,
                live_tasks=live_in_step(
                    name,
                    stage,
                    sizes=sizes,
                    schedule=schedule,
                    num_microbatches=num_microbatches,
                    shared=module.shared,
                ),
            )
            for name, module in modules.items()
            for stage, costs in enumerate(module.stages)
        }
        return self._estimate(
            modules,
            schedule=schedule,
            num_microbatches=num_microbatches,
            num_samples=global_batch_size,
            num_gpus=num_gpus,
            memory=memory,
        )

    def _modules_in_step(
        self,
        sizes: Mapping[str, ParallelSizes],
        *,
        num_samples: int,
        num_microbatches: int,
        schedule: ScheduleChoice,
        layers_per_stage: Mapping[str, Sequence[int] | None],
        shared: Mapping[str, bool],
    ) -> dict[str, ModuleInStep]:
        group = schedule.encoder_group or num_microbatches
        encoders = {source for source, end in self.model.edges if end == LANGUAGE}
        modules = {}
        for name, its in sizes.items():
            in_groups = schedule.kind == "colocated" and name in encoders
            per_task = group if in_groups else 1
            samples = per_task * num_samples / num_microbatches / its.dp
            modules[name] = ModuleInStep(
                name=name,
                stages=self.stages(
                    name,
                    its,
                    samples_per_task=samples,
                    layers_per_stage=layers_per_stage.get(name),
                ),
                chunks=its.chunks,
                shared=shared.get(name, False) and name != LANGUAGE,
                entry_s=self.entry_s(name, samples),
                task_microbatches=per_task,
            )
        return modules

    def _estimate(
        self,
        modules: Mapping[str, ModuleInStep],
        *,
        schedule: ScheduleChoice,
        num_microbatches: int,
        num_samples: int,
        num_gpus: int,
        memory: Mapping[tuple[HostedStage, ...], Mapping[str, float]],
    ) -> StepEstimate:
        breakdown = step_breakdown(
            modules,
            edges=self.model.edges,
            kind=schedule.kind,
            num_microbatches=num_microbatches,
            encoder_group=schedule.encoder_group,
        )
        flops = num_samples * sum(self.flops_per_sample(name) for name in modules)
        return StepEstimate(breakdown=breakdown, memory=memory, flops=flops, num_gpus=num_gpus)

    def entry_s(self, name: str, samples: float) -> float:
        """Time in which the rows that a module takes from others arrive, for one task."""
        rows_bytes = sum(
            2 * self.model.modules[source].rows_per_sample * samples
            for source, target in self.model.edges
            if target == name
        )
        far = Group.of(self.cluster, size=2, stride=max(1, self.cluster.gpus_per_node)).far
        return send_s(far, message_bytes=rows_bytes * self.model.modules[name].hidden_size)


def even_split(num_layers: int, num_stages: int) -> tuple[int, ...]:
    """Layers of each stage, as equal as they can be; the first stages have more."""
    each, more = divmod(num_layers, num_stages)
    return tuple(each + (stage < more) for stage in range(num_stages))
