"""MimoModel, upstream's model of specs, as modules with layouts of their own.

Its modules are its modalities, see ``mimo_parts``. Rows of encoders that are modules of their own
are combined and projected where they meet, on the language model's first stage.

The class builds from specs whatever its role names, so while a module is built the constructor
gets that module's role, and specs with its groups and sizes.
"""

import functools
import inspect
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.mimo.config import MimoModelConfig
from megatron.core.models.mimo.config.role import ModuleLayout, RankRole
from megatron.core.models.mimo.model.base import MimoModel
from megatron.core.models.mimo.submodules.base import ModalitySubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import unwrap_model

from megatron_mosaic.host.families.family import ModuleBoundary, check_edges, facts_of
from megatron_mosaic.host.families.llava import retarget
from megatron_mosaic.host.families.mimo_boundary import MimoBoundary
from megatron_mosaic.host.families.mimo_parts import (
    ModalityPart,
    check_sizes,
    modality_parts,
    split_modalities,
)
from megatron_mosaic.host.groups import ModuleGroups, StageGroup
from megatron_mosaic.layout.model_facts import check_module
from megatron_mosaic.layout.placement import LANGUAGE, ModulePlacement
from megatron_mosaic.layout.plan import Plan


class MimoFamily:
    """MimoModel: a module for each modality or each of its encoders, and the language model."""

    model_class = MimoModel

    def building_one_module(
        self, groups: ModuleGroups, *, plan: Plan
    ) -> AbstractContextManager[None]:
        """Makes MimoModel build one module only."""
        return building_one_module(groups, plan=plan)

    def parts(self, model: torch.nn.Module, name: str) -> Mapping[str, str]:
        """Tells where the encoders and the projection of a modality lie, or the decoder's parts."""
        mimo: Any = unwrap_model(model)
        if name != LANGUAGE:
            part = mimo.mosaic_parts[name]
            path = f"modality_submodules.{part.modality}"
            if part.is_output:
                return {"projector": f"{path}.output_projections", "decoder": f"{path}.decoders"}
            return {"encoder": f"{path}.encoders", "projector": f"{path}.input_projections"}
        parts = {
            "embedding": "language_model.embedding",
            "decoder": "language_model.decoder",
            "output_layer": "language_model.output_layer",
        }
        return parts | {
            f"{modality}_projector": f"modality_submodules.{modality}.input_projections"
            for modality in split_modalities(mimo.mosaic_parts)
        }

    def boundary(self, model: torch.nn.Module, name: str) -> ModuleBoundary:
        """Returns the translator of a module."""
        mimo: Any = unwrap_model(model)
        return MimoBoundary(mimo, name, parts=mimo.mosaic_parts)


@contextmanager
def building_one_module(groups: ModuleGroups, *, plan: Plan) -> Iterator[None]:
    """Makes MimoModel build one module only, on that module's groups and sizes."""
    original = MimoModel.__init__
    signature = inspect.signature(original)

    @functools.wraps(original)
    def build_part(self: MimoModel, *args: Any, **kwargs: Any) -> None:
        bound = signature.bind(self, *args, **kwargs)
        whole = bound.arguments["mimo_config"]
        check_sizes(groups.placement)
        parts = modality_parts(whole, plan)
        check_edges(plan, outputs=[name for name, part in parts.items() if part.is_output])
        bound.arguments |= {
            "mimo_config": _config_of_one(whole, parts, groups),
            "cp_group": groups.collection.cp,
            "tp_group": groups.collection.tp,
        }
        original(*bound.args, **bound.kwargs)
        _finish(self, whole, parts, groups)

    MimoModel.__init__ = build_part
    try:
        yield
    finally:
        MimoModel.__init__ = original


class _Place:
    """Stands where MimoModel expects a HyperCommGrid: it asks for its role and nothing else."""

    dim_names = ("pp",)

    def __init__(self, stage: StageGroup | None) -> None:
        self._stage = stage
        self.rank_offset, self.size = (-1, 0) if stage is None else (dist.get_rank(), 1)

    def get_pg(self, dims: str) -> StageGroup | None:
        return self._stage


def _config_of_one(
    whole: MimoModelConfig, parts: Mapping[str, ModalityPart], groups: ModuleGroups
) -> MimoModelConfig:
    """Returns a config from which MimoModel builds one module."""
    if groups.placement.name == LANGUAGE:
        return _config_of_language(whole, parts, groups)
    return _config_of_modality(whole, parts[groups.placement.name], groups)


def _config_of_language(
    whole: MimoModelConfig, parts: Mapping[str, ModalityPart], groups: ModuleGroups
) -> MimoModelConfig:
    """Leaves of the modalities the projections of those whose encoders are modules."""
    # Rows are projected where they arrive, before the sequence is sharded.
    split = split_modalities(parts) if groups.is_first_stage else []
    whole_rows = replace(groups, placement=replace(groups.placement, sequence_parallel=False))
    specs = dict(whole.modality_submodules_spec)
    for modality in split:
        specs[modality] = _place(_without(specs[modality], "encoders"), whole_rows)
    alone = StageGroup(0, (dist.get_rank(),))
    stages = dict.fromkeys(split, alone) | {LANGUAGE: groups.pipeline}
    return replace(
        whole,
        language_model_spec=_language_spec(whole.language_model_spec, groups),
        modality_submodules_spec=specs,
        module_to_grid_map={name: _Place(stages.get(name)) for name in [*specs, LANGUAGE]},
    )


def _config_of_modality(
    whole: MimoModelConfig, part: ModalityPart, groups: ModuleGroups
) -> MimoModelConfig:
    """Leaves one modality, or one of its encoders, and nothing of the language model."""
    spec = _modality_spec(whole.modality_submodules_spec[part.modality], part)
    config = first_config(spec) or whole.language_model_spec.params["config"]
    check_module(groups.placement, facts_of(config))
    specs = dict(whole.modality_submodules_spec) | {part.modality: _place(spec, groups)}
    stages = {part.modality: groups.pipeline}
    return replace(
        whole,
        # The module's own config: DDP and the gradient rules read it from the model.
        language_model_spec=ModuleSpec(
            module=whole.language_model_spec.module,
            params={"config": _config_of_module(config, groups.placement, part)},
        ),
        modality_submodules_spec=specs,
        # Upstream would tell its own communicator how rows are split over replicas.
        special_token_ids={},
        module_to_grid_map={name: _Place(stages.get(name)) for name in [*specs, LANGUAGE]},
    )


def _config_of_module(
    config: TransformerConfig, placement: ModulePlacement, part: ModalityPart
) -> TransformerConfig:
    own = retarget(config, placement)
    if part.is_output:
        # Its gradient is a mean or a sum over replicas as the language model's.
        own.calculate_per_token_loss = config.calculate_per_token_loss
    return own


def _language_spec(spec: ModuleSpec, groups: ModuleGroups) -> ModuleSpec:
    config = spec.params["config"]
    check_module(groups.placement, facts_of(config))
    placed = _place(spec, groups)
    placed.params |= {"pre_process": groups.is_first_stage, "post_process": groups.is_last_stage}
    if groups.placement.sequence_parallel:
        # MimoModel scatters the merged embeddings itself, and insists on this.
        placed.params["scatter_embedding_sequence_parallel"] = False
    return placed


def _modality_spec(spec: ModuleSpec, part: ModalityPart) -> ModuleSpec:
    if part.whole:
        return spec
    alone = _without(spec, "input_projections")
    encoders = {encoder: spec.submodules["encoders"][encoder] for encoder in part.encoders}
    return replace(alone, submodules=alone.submodules | {"encoders": encoders})


def _without(spec: ModuleSpec, key: str) -> ModuleSpec:
    return replace(spec, submodules={k: v for k, v in spec.submodules.items() if k != key})


def _place(spec: ModuleSpec, groups: ModuleGroups) -> ModuleSpec:
    """Copies a spec with the groups and sizes of a module, down to encoders and projections."""
    if not isinstance(spec, ModuleSpec):
        return spec
    params = {key: _placed(value, groups.placement) for key, value in (spec.params or {}).items()}
    modality = issubclass(spec.module, ModalitySubmodules)
    if _accepts(spec.module, "pg_collection"):
        params["pg_collection"] = groups.collection
    elif _accepts(spec.module, "tp_group"):
        params["tp_group"] = groups.collection.tp
    submodules = spec.submodules
    if modality:
        submodules = {key: _place_all(below, groups) for key, below in spec.submodules.items()}
    return replace(spec, params=params, submodules=submodules)


def _accepts(cls: type, parameter: str) -> bool:
    """Tells whether a class takes an argument, itself or by handing what is left to its base."""
    for base in cls.__mro__:
        parameters = inspect.signature(base.__init__).parameters
        if parameter in parameters:
            return True
        if all(each.kind is not inspect.Parameter.VAR_KEYWORD for each in parameters.values()):
            return False
    return False


def _place_all(below: Any, groups: ModuleGroups) -> Any:
    if isinstance(below, Mapping):
        return {key: _place(spec, groups) for key, spec in below.items()}
    return [_place(spec, groups) for spec in below]


def _placed(value: Any, placement: ModulePlacement) -> Any:
    return retarget(value, placement) if isinstance(value, TransformerConfig) else value


def first_config(spec: ModuleSpec) -> TransformerConfig | None:
    """Finds the config of a modality's first encoder that has one, else of what else it has."""
    below = (spec.submodules or {}).items()
    for _, specs in sorted(below, key=lambda item: item[0] != "encoders"):
        for inner in specs.values() if isinstance(specs, Mapping) else specs:
            for value in (inner.params or {}).values():
                if isinstance(value, TransformerConfig):
                    return value
    return None


def _finish(
    model: Any,
    whole: MimoModelConfig,
    parts: Mapping[str, ModalityPart],
    groups: ModuleGroups,
) -> None:
    """Gives a built module what the rest of Megatron and Mosaic asks it for."""
    model.mimo_config = whole
    model.mosaic_parts = dict(parts)
    model.pre_process, model.post_process = groups.is_first_stage, groups.is_last_stage
    if groups.placement.name != LANGUAGE:
        return
    # Not modalities: their projections here are part of the language model.
    model.register_forward_pre_hook(_without_mask, with_kwargs=True)
    stages = {LANGUAGE: model.role.modules[LANGUAGE]}
    model.role = RankRole(modules=stages, mode=ModuleLayout.NON_COLOCATED)
    language = model.language_model
    # Gradients of tied embeddings are reduced between the stages that hold them.
    model.share_embeddings_and_output_weights = language.share_embeddings_and_output_weights
    model.shared_embedding_or_output_weight = language.shared_embedding_or_output_weight


def _without_mask(
    model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Drops the script's attention mask, as MimoModel does where it holds all modules."""
    if "attention_mask" in kwargs:
        kwargs = kwargs | {"attention_mask": None}
    return (*args[:2], *(None for _ in args[2:3]), *args[3:]), kwargs
