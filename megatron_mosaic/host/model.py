"""All modules of a rank as the one model that Megatron's training loop sees."""

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any, ClassVar, NamedTuple

import torch
from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.models.mimo.model.base import MimoModel
from megatron.core.transformer.module import Float16Module, MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import sharded_state_dict_default
from megatron.core.utils import GlobalMemoryBuffer, unwrap_model
from megatron.training.arguments import core_transformer_config_from_args
from megatron.training.global_vars import get_args
from megatron.training.models.base import ModelBuilder, ModelConfig
from megatron.training.models.dist_utils import (
    prepare_existing_model_chunks_for_distributed_training,
)
from megatron.training.training import get_megatron_optimizer_config

from megatron_mosaic.engine.lanes import inside
from megatron_mosaic.errors import LayoutError, PlanError
from megatron_mosaic.host.channels import ActivationSizes
from megatron_mosaic.host.checkpoint import LayerKeys, check_weights
from megatron_mosaic.host.families.family import ModuleBoundary, building_one_module, family_of
from megatron_mosaic.host.families.registry import known_families
from megatron_mosaic.host.gradients import accumulate_on_current_stream, unlink_reductions
from megatron_mosaic.host.groups import ModuleGroups, lone_collection, trained_collection
from megatron_mosaic.host.optimizer import GridMap, ModuleGrid
from megatron_mosaic.host.parallel_state_scope import ParallelStateScope
from megatron_mosaic.host.recompute import keep_gradients_of_recomputed
from megatron_mosaic.host.replicas import check_replicas
from megatron_mosaic.host.runner import ModuleRunner
from megatron_mosaic.host.runtime import Runtime, share_row_facts
from megatron_mosaic.host.stages import (
    as_one_module,
    each_in_precision,
    stages_in,
    tie_embeddings,
)
from megatron_mosaic.host.trainable import (
    Trainability,
    TrainableStage,
    check_trainable,
    gather_trainability,
)
from megatron_mosaic.host.weights import NamedParameter, initialize_by_name, mark_gated_linears
from megatron_mosaic.layout.placement import LANGUAGE
from megatron_mosaic.layout.plan import Plan


class MosaicModel(MimoModel):
    """The modules that this rank hosts, each with its own DDP wrapper.

    A ``MimoModel`` by type, not by construction: Megatron routes a MimoModel to its per-module
    optimizer, and the hooks of the loop (gradient buffers, ``no_sync``, parameter gathers) run
    over ``language_model`` and ``modality_submodules``.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        runtime: Runtime,
        grids: GridMap,
        layer_keys: LayerKeys,
    ) -> None:
        MegatronModule.__init__(self, config=config)
        self._layer_keys = layer_keys
        self.mimo_config = SimpleNamespace(module_to_grid_map=grids)
        self.language_model = None
        self.modality_submodules = torch.nn.ModuleDict()
        # A name, not a submodule: the engine finds its state through the model it is handed.
        object.__setattr__(self, "runtime", runtime)
        self.pg_collection = lone_collection(runtime.alone)
        self.rng_state_key_prefix = f"rank{runtime.rank}."

    def add(self, name: str, module: torch.nn.Module) -> None:
        """Adds a module of this rank under its name in the plan."""
        if name == LANGUAGE:
            self.language_model = module
        else:
            self.modality_submodules[name] = module

    def hosted(self) -> dict[str, torch.nn.Module]:
        """Modules on this rank by their names in the plan."""
        language = {} if self.language_model is None else {LANGUAGE: self.language_model}
        return language | dict(self.modality_submodules.items())

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """Maps every module's weights under the names of the whole, stock model.

        So a checkpoint says nothing about the layout that wrote it.
        """
        entries: dict[str, Any] = {}
        for name, number, stage in self._stages():
            own = dict(metadata or {}) | {
                "dp_cp_group": stage.pg_collection.dp_cp,
                "non_homogeneous_layers": self._layer_keys.apart(name),
            }
            with ParallelStateScope(stage.pg_collection).active():
                found = sharded_state_dict_default(stage, prefix, sharded_offsets, own)
            entries.update({_key_of(key, number): entry for key, entry in found.items()})
        if not entries:
            # Megatron drops what is empty while it loads, and then misses it.
            entries["idle"] = LocalNonpersistentObject(True)
        return entries

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True) -> None:
        """Loads every module from the names of :meth:`sharded_state_dict`."""
        for _, number, stage in self._stages():
            own = {
                key: state_dict[_key_of(key, number)]
                for key in stage.state_dict()
                if _key_of(key, number) in state_dict
            }
            stage.load_state_dict(own, strict=strict)
        self._layer_keys.loaded()

    def _stages(self) -> Iterator[tuple[str, int, Any]]:
        """Yields module, number on this rank and unwrapped model of every stage here."""
        for name, module in self.hosted().items():
            for number, stage in enumerate(stages_in(module)):
                yield name, number, unwrap_model(stage)


def _key_of(key: str, number: int) -> str:
    """Tells the entries of a rank's stages apart; what a checkpoint says is in their values."""
    return f"stage{number}.{key}" if number else key


@dataclass
class MosaicModelConfig(ModelConfig):
    """Makes the stock loop build the modules of a plan."""

    builder: ClassVar[str] = "megatron_mosaic.host.model.MosaicBuilder"
    # Leading underscore: Megatron does not serialise it into checkpoints.
    _provider: Callable[..., torch.nn.Module] | None = None
    _runtime: Runtime | None = None


class MosaicBuilder(ModelBuilder):
    """Builds the modules that a rank hosts."""

    def build_model(
        self,
        pg_collection: Any,
        pre_process: bool | None = None,
        post_process: bool | None = None,
        vp_stage: int | None = None,
    ) -> torch.nn.Module:
        """Not used: a rank may host several modules."""
        raise NotImplementedError("a plan's modules are built by build_distributed_models")

    def build_distributed_models(
        self,
        pg_collection: Any,
        ddp_config: DistributedDataParallelConfig | None = None,
        overlap_param_gather_with_optimizer_step: bool = False,
        use_megatron_fsdp: bool = False,
        use_torch_fsdp2: bool = False,
        wrap_with_ddp: bool = True,
        data_parallel_random_init: bool = False,
        mixed_precision_wrapper: Any = Float16Module,
        model_type: Any = None,
        **later: Any,
    ) -> list[MosaicModel]:
        """Builds, initialises and wraps every module of this rank.

        Args other than Megatron's of 0.19 (``later``) belong to optimizers that arguments refuse.

        Raises:
            SystemExit: The script froze something else than the plan says, on some rank.

        Note:
            Collective over the world.
        """
        runtime, provider = self._model_config._runtime, self._model_config._provider
        args = get_args()
        ddp_config = ddp_config or DistributedDataParallelConfig()
        built = _build_modules(provider, runtime)
        trainability = _settle_weights(built, runtime)
        runtime.trained = trainability.share
        model = MosaicModel(
            core_transformer_config_from_args(args),
            runtime=runtime,
            grids=_grid_map(runtime, ddp_config, trainability),
            layer_keys=LayerKeys(args, uneven=trainability.uneven),
        )
        wrap = partial(
            prepare_existing_model_chunks_for_distributed_training,
            wrap_with_ddp=wrap_with_ddp,
            mixed_precision_wrapper=each_in_precision(mixed_precision_wrapper),
        )
        for name, stages in built.items():
            for runner in _runners_of(stages, name, runtime, ddp_config, wrap=wrap):
                runtime.runners[runner.stage] = runner
                model.add(name, runner.wrapped)
        share_row_facts(runtime, args)
        _open_channels(runtime)
        runtime.randomness.park()
        check_weights(model, args, group=runtime.host_group)
        return [model]


def _runners_of(
    stages: "Sequence[_Built]",
    name: str,
    runtime: Runtime,
    ddp_config: DistributedDataParallelConfig,
    *,
    wrap: Callable[..., list[torch.nn.Module]],
) -> Iterator[ModuleRunner]:
    """Wraps a module over its own replicas, and lets its stages here run tasks."""
    collection = runtime.hosted[name].collection
    boundaries = [
        family_of(built.module, known_families()).boundary(built.module, name) for built in stages
    ]
    config = _ddp_config_of(boundaries[0], ddp_config)
    module: Any = as_one_module([built.module for built in stages], collection=collection)
    with inside(runtime.lanes, name):
        (wrapped,) = wrap([module], module.config, collection, ddp_config=config)
        if runtime.lanes is not None:
            accumulate_on_current_stream(wrapped)
    unlink_reductions(wrapped)
    memory_buffer = GlobalMemoryBuffer() if runtime.lanes is not None else None
    for model, built, boundary in zip(stages_in(wrapped), stages, boundaries, strict=True):
        yield ModuleRunner(
            model,
            wrapped=wrapped,
            groups=built.groups,
            boundary=boundary,
            randomness=runtime.randomness,
            memory_buffer=memory_buffer,
        )


def _open_channels(runtime: Runtime) -> None:
    """Opens what carries this rank's activations, now that all sizes are known."""
    if not runtime.runners:
        return
    args = get_args()
    runtime.channels.open_all(
        ActivationSizes(
            hidden_size=runtime.row_facts[LANGUAGE].width,
            sequence_length=runtime.row_facts[LANGUAGE].sequence_length,
            rows=runtime.row_facts,
            dtype=args.params_dtype,
        ),
        device=torch.device(torch.cuda.current_device()),
    )


class _Built(NamedTuple):
    """A stage, what trains in it, and the random weights that stay as the script made them."""

    groups: ModuleGroups
    module: torch.nn.Module
    trainable: TrainableStage
    kept: list[NamedParameter]


def _build_modules(
    provider: Callable[..., torch.nn.Module], runtime: Runtime
) -> dict[str, list[_Built]]:
    """Builds this rank's modules, or stops all ranks if the script and the plan disagree."""
    built = {}
    error = None
    for name, groups in runtime.hosted.items():
        try:
            built[name] = _build_module(provider, groups, runtime=runtime)
        except (PlanError, LayoutError) as plan_error:
            error = error or str(plan_error)
    runtime.agreement.settle("model", error)
    return built


def _settle_weights(built: Mapping[str, Sequence[_Built]], runtime: Runtime) -> Trainability:
    """Puts together what trains anywhere, and checks what only several ranks can tell."""
    stages = [each for of_module in built.values() for each in of_module]
    trainability = gather_trainability(
        [each.trainable for each in stages],
        runtime.plan.modules,
        group=runtime.host_group,
    )
    check_replicas(
        [(each.groups, each.kept) for each in stages],
        group=runtime.host_group,
    )
    _check_saving(trainability, runtime.plan)
    return trainability


def _check_saving(trainability: Trainability, plan: Plan) -> None:
    """Refuses what would lose an optimizer, as arguments.py does for modules."""
    args = get_args()
    for name, stages in trainability.stages.items():
        writer = any(0 in plan.modules[name].stage_ranks(stage) for stage in stages)
        if args.save and stages and not (writer or args.bf16 or args.use_distributed_optimizer):
            raise PlanError(
                f"modules.{name}: trainable={list(plan.modules[name].trainable or ())} must leave "
                f"rank 0 a trainable weight with --save in fp32, for Megatron would save rank 0's "
                f"optimizer only; add --use-distributed-optimizer"
            )


def _build_module(
    provider: Callable[..., torch.nn.Module], groups: ModuleGroups, *, runtime: Runtime
) -> list[_Built]:
    """Builds this rank's stages of one module through the script's own provider."""
    runtime.randomness.seed(groups, seed=get_args().seed)
    stages = groups.of_stages()
    modules = [_build_stage(provider, each, runtime=runtime) for each in stages]
    if len(modules) == groups.placement.num_stages > 1:
        tie_embeddings(modules)
    return [_finish_stage(module, each) for module, each in zip(modules, stages, strict=True)]


def _build_stage(
    provider: Callable[..., torch.nn.Module], groups: ModuleGroups, *, runtime: Runtime
) -> torch.nn.Module:
    name = groups.placement.name
    with (
        _as_scripts_assert(get_args()),
        ParallelStateScope(groups.collection).active(),
        runtime.randomness.of(name),
        building_one_module(known_families(), groups, plan=runtime.plan),
    ):
        return provider(pre_process=groups.is_first_stage, post_process=groups.is_last_stage)


def _finish_stage(module: Any, groups: ModuleGroups) -> _Built:
    """Gives a built stage what Megatron and Mosaic ask it for, and its initial weights."""
    name = groups.placement.name
    # The stock loop wants one on the model, so scripts may have set it to the global groups.
    module.pg_collection = groups.collection
    parts = family_of(module, known_families()).parts(module, name)
    trainable = check_trainable(module, groups.placement, parts=parts, stage=groups.stage)
    mark_gated_linears(module)
    keep_gradients_of_recomputed(module)
    for part in module.modules():
        # Some upstream modules look their tensor-parallel group up when they are checkpointed.
        if isinstance(part, MegatronModule) and not hasattr(part, "tp_group"):
            part.tp_group = groups.collection.tp
    kept = initialize_by_name(module, seed=get_args().seed, groups=groups)
    return _Built(groups, module, trainable, kept)


@contextmanager
def _as_scripts_assert(args: argparse.Namespace) -> Iterator[None]:
    """Shows a provider arguments that it does not refuse; its module gets the plan's sizes.

    ``pretrain_vlm.py`` wants the legacy checkpoint format, which cannot hold a plan's layouts, and
    no pipeline together with context parallelism.
    """
    former = args.ckpt_format, args.pipeline_model_parallel_size
    args.ckpt_format = "torch"
    if args.context_parallel_size > 1:
        args.pipeline_model_parallel_size = 1
    try:
        yield
    finally:
        args.ckpt_format, args.pipeline_model_parallel_size = former


def _ddp_config_of(
    boundary: ModuleBoundary, ddp_config: DistributedDataParallelConfig
) -> DistributedDataParallelConfig:
    own = deepcopy(ddp_config)
    # The engine starts parameter gathers itself, before the first task (see gradients.py).
    own.align_param_gather = own.overlap_param_gather
    if not boundary.makes_loss:
        own.average_in_collective = False
    return own


def _grid_map(
    runtime: Runtime, ddp_config: DistributedDataParallelConfig, trainability: Trainability
) -> GridMap:
    optimizer_config, _ = get_megatron_optimizer_config(get_args())
    grids = {
        name: ModuleGrid(
            trained_collection(
                runtime.hosted.get(name), placement, trainability.stages[name], runtime.factory
            )
        )
        for name, placement in runtime.plan.modules.items()
    }
    return GridMap(
        grids,
        optimizer_config=optimizer_config,
        ddp_config=ddp_config,
        alone=lone_collection(runtime.alone),
    )
