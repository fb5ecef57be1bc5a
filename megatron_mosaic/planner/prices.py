"""The cost model as the planner asks it, with answers kept for what differs in nothing."""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from megatron_mosaic.cluster.spec import Cluster
from megatron_mosaic.cost.boundary import boundary_s
from megatron_mosaic.cost.collectives import Group, send_s
from megatron_mosaic.cost.costs import ModuleCosts, PartRun, StageCosts, StageMemory
from megatron_mosaic.cost.memory import module_parts, stage_memory, with_memory
from megatron_mosaic.cost.parts import module_costs
from megatron_mosaic.cost.sizes import ParallelSizes, TrainingSettings
from megatron_mosaic.cost.stages import StageWork, stage_costs
from megatron_mosaic.layout.placement import LANGUAGE
from megatron_mosaic.model.spec import ModelSpec


class _StageKey(NamedTuple):
    """What tells stages of a module under some sizes apart."""

    first: bool
    last: bool
    layers: tuple[tuple[int, int], ...]
    upstream: bool


class ModelPrices:
    """Costs of one model on one cluster.

    A module's parts cost the same for any number of replicas and stages, and stages with the same
    parts cost the same, so most questions have been answered before.

    Args:
        model: What is trained.
        cluster: On what.
        settings: What the run does alike for all modules.
    """

    def __init__(self, model: ModelSpec, cluster: Cluster, settings: TrainingSettings) -> None:
        self.model, self.cluster, self.settings = model, cluster, settings
        self._parts: dict[tuple[str, ParallelSizes, int], ModuleCosts] = {}
        self._modules: dict[tuple[str, ParallelSizes, int], ModuleCosts] = {}
        self._stages: dict[int, tuple[ModuleCosts, dict[_StageKey, StageCosts]]] = {}

    def module(self, name: str, sizes: ParallelSizes, *, samples: int) -> ModuleCosts:
        """Costs of a module for tasks of some samples of one replica."""
        key = (name, sizes, samples)
        known = self._modules.get(key)
        if known is None:
            parts = self._parts_of(name, sizes, samples)
            known = replace(parts, sizes=sizes, hop_s=self._hop_s(parts, sizes))
            self._modules[key] = known
        return known

    def _parts_of(self, name: str, sizes: ParallelSizes, samples: int) -> ModuleCosts:
        # Tied embeddings alone care for stages: a second copy of them is on the last one.
        alike = replace(sizes, dp=1, pp=min(sizes.pp, 2))
        key = (name, alike, samples)
        known = self._parts.get(key)
        if known is None:
            known = self._parts[key] = self._counted(name, alike, samples)
        return known

    def _counted(self, name: str, sizes: ParallelSizes, samples: int) -> ModuleCosts:
        module = self.model.modules[name]
        costs = module_costs(
            module,
            sizes=sizes,
            samples=samples,
            cluster=self.cluster,
            settings=self.settings,
            precision=self.model.precision,
        )
        held = module_parts(
            module,
            sizes=sizes,
            settings=self.settings,
            samples=samples,
            precision=self.model.precision,
            gradient_arrives=self._gradient_arrives(name),
        )
        return with_memory(costs, held)

    def _gradient_arrives(self, name: str) -> bool:
        sources = [source for source, destination in self.model.edges if destination == name]
        return any(self.model.modules[source].trainable != () for source in sources)

    def _hop_s(self, parts: ModuleCosts, sizes: ParallelSizes) -> float:
        if sizes.pp == 1:
            return 0.0
        stage = Group.of(self.cluster, size=2, stride=sizes.tp * sizes.cp * sizes.dp)
        return send_s(stage.far, message_bytes=parts.hop_bytes)

    def stages(
        self, costs: ModuleCosts, layers_per_stage: Sequence[int], *, trainable_upstream: bool
    ) -> tuple[StageCosts, ...]:
        """Costs of a module's pipeline stages."""
        kept = self._stages.get(id(costs))
        if kept is None:
            kept = self._stages[id(costs)] = (costs, {})
        known = kept[1]
        stages, upstream = [], trainable_upstream
        runs = [[run.count, index] for index, run in enumerate(costs.layers) if run.count]
        for number, count in enumerate(layers_per_stage):
            first, last = number == 0, number == len(layers_per_stage) - 1
            layers = _take(runs, count)
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
            memory=self._memory(costs, runs),
        )

    def held(self, costs: ModuleCosts, *runs: PartRun) -> StageMemory:
        """Memory of a stage that has these parts."""
        return self._memory(costs, runs)

    def _memory(self, costs: ModuleCosts, runs: Sequence[PartRun]) -> StageMemory:
        return stage_memory(
            runs, sizes=costs.sizes, settings=self.settings, precision=self.model.precision
        )

    def boundary_s(
        self,
        name: str,
        encoder: ParallelSizes,
        *,
        language: ParallelSizes,
        num_samples: int,
        in_place: bool,
    ) -> float:
        """Time to bring an encoder's rows to the language model, and as long for gradients.

        Args:
            name: The encoder.
            encoder: Its sizes.
            language: Sizes of the language model.
            num_samples: Samples of the task, of all replicas.
            in_place: Whether the rows are already where they are wanted.
        """
        if in_place:
            return 0.0
        rows_bytes = (
            2 * self.model.modules[name].rows_per_sample * self.model.modules[LANGUAGE].hidden_size
        )
        return boundary_s(
            num_samples * rows_bytes, source=encoder, destination=language, cluster=self.cluster
        )


def _take(runs: list[list[int]], count: int) -> tuple[tuple[int, int], ...]:
    """Takes layers from the front of runs: how many of which run."""
    taken = []
    while count:
        available, index = runs[0]
        number = min(available, count)
        taken.append((number, index))
        count -= number
        if number == available:
            runs.pop(0)
        else:
            runs[0][0] -= number
    return tuple(taken)
