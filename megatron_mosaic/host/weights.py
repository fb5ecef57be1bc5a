"""Initial weights from the seed and the global parameter name, whatever the layout.

Megatron's own initial weights depend on tensor-parallel size, pipeline stage and the order in
which modules are built. Here every random weight is drawn whole, by the script's own init
method under a seed of its own, and each rank keeps its shard.
"""

import hashlib
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.vision.clip_vit_model import CLIPViTModel
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.training.utils import print_rank_0

from megatron_mosaic.host.groups import ModuleGroups

InitMethod = Callable[[torch.Tensor], object]

_LAYER = re.compile(r"^(.*\blayers\.)(\d+)$")
_TIED_COPY = re.compile(r"\boutput_layer\.weight$")
# Linear layers whose weight Megatron scales down with depth.
_OUTPUT_LINEARS = ("linear_proj", "linear_fc2")


def initialize_by_name(
    module: torch.nn.Module, *, seed: int, groups: ModuleGroups
) -> "list[NamedParameter]":
    """Overwrites the random weights of a module with values that no layout changes.

    Weights that the script set to a constant (biases, norms) stay. A random weight whose init
    method is not known stays as the script made it; rank 0 says so once.

    Returns:
        The weights that stay as the script made them, constants left out.
    """
    owners = dict(module.named_modules())
    kept = []
    for name, local, parameter in global_named_parameters(module):
        owner, _, key = local.rpartition(".")
        if parameter.numel() == 0 or bool((parameter == parameter.flatten()[0]).all()):
            continue
        init_method = _init_method(owners, owner, key, parameter)
        if init_method is None:
            kept.append(NamedParameter(name, local, parameter))
            continue
        full = _draw(
            parameter, init_method, groups=groups, seed=_seed_of(seed, tied_name(name, parameter))
        )
        with torch.no_grad():
            parameter.copy_(shard_of(full, parameter, groups=groups))
    if kept:
        shown = ", ".join(weight.name for weight in kept)
        print_rank_0(f"mosaic: initial weights left as the script made them: {shown}")
    return kept


class NamedParameter(NamedTuple):
    """A parameter under its name in the whole model and under its name on this rank."""

    name: str
    local_name: str
    parameter: torch.nn.Parameter


def global_named_parameters(module: torch.nn.Module) -> Iterator[NamedParameter]:
    """Yields the parameters of a module under names that no stage or expert rank changes."""
    renamed = _global_prefixes(module)
    for local_name, parameter in module.named_parameters():
        name = local_name
        # An expert lies in a layer: the longer prefix first, since the shorter stays in place.
        for local in sorted(renamed, key=len, reverse=True):
            if local_name.startswith(local):
                name = renamed[local] + name[len(local) :]
        yield NamedParameter(name, local_name, parameter)


def _global_prefixes(module: torch.nn.Module) -> dict[str, str]:
    """Names of layers and experts on this rank, each with the last number of its global name."""
    renamed = {}
    owner: Any
    for name, owner in module.named_modules():
        match = _LAYER.match(name)
        number = getattr(owner, "layer_number", None)
        if match and number is not None:
            renamed[f"{name}."] = f"{match[1]}{number - 1}."
        if isinstance(owner, SequentialMLP):
            first = owner.ep_group.rank() * owner.num_local_experts
            for local in range(owner.num_local_experts):
                experts = f"{name}.local_experts."
                renamed[f"{experts}{local}."] = f"{experts}{first + local}."
    return renamed


def tied_name(name: str, parameter: torch.Tensor) -> str:
    """Returns the global name whose values a parameter has.

    With tied embeddings the last pipeline stage holds a copy of the first one's embedding as the
    weight of its output layer.
    """
    if getattr(parameter, "shared_embedding", False):
        return _TIED_COPY.sub("embedding.word_embeddings.weight", name)
    return name


def partition_of(parameter: Any) -> tuple[int, int]:
    """Returns the dimension along which a parameter is split over TP (or -1) and its stride.

    The stride is 2 for the first linear layer of a gated MLP: gate and up projection are split
    each for itself.
    """
    if not getattr(parameter, "tensor_model_parallel", False):
        return -1, 1
    return parameter.partition_dim, getattr(parameter, "mosaic_stride", parameter.partition_stride)


def mark_gated_linears(module: torch.nn.Module) -> None:
    """Notes on parameters of gated MLPs that their halves are split one by one."""
    owner: Any
    for owner in module.modules():
        linear: Any = getattr(owner, "linear_fc1", None)
        if linear is not None and owner.config.gated_linear_unit:
            for parameter in linear.parameters(recurse=False):
                parameter.mosaic_stride = 2


class Split(NamedTuple):
    """Ranks that split a parameter, and this rank's place among them."""

    size: int
    index: int


def is_expert(parameter: torch.nn.Parameter) -> bool:
    """Whether a parameter's shards and replicas are those of the experts' grid.

    Megatron marks it so where that grid differs from the module's own.
    """
    return not getattr(parameter, "allreduce", True)


def split_of(parameter: torch.nn.Parameter, *, groups: ModuleGroups) -> Split:
    """Returns the ranks that split a parameter's partitioned dimension."""
    if is_expert(parameter):
        return Split(groups.placement.expert_shape.expt_tp, groups.expert_position.expt_tp)
    return Split(groups.placement.tensor_model_parallel_size, groups.position.tp)


def shard_of(
    full: torch.Tensor, parameter: torch.nn.Parameter, *, groups: ModuleGroups
) -> torch.Tensor:
    """Returns this rank's part of a whole parameter."""
    dim, stride = partition_of(parameter)
    if dim < 0:
        return full
    size, index = split_of(parameter, groups=groups)
    return torch.cat(full.chunk(size * stride, dim=dim)[index::size], dim=dim)


def _seed_of(seed: int, name: str) -> int:
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def _draw(
    parameter: torch.nn.Parameter, init_method: InitMethod, *, groups: ModuleGroups, seed: int
) -> torch.Tensor:
    dim, _ = partition_of(parameter)
    shape = list(parameter.shape)
    if dim >= 0:
        shape[dim] *= split_of(parameter, groups=groups).size
    full = torch.empty(shape, dtype=torch.float32, device=parameter.device)
    # Seeding the host seeds the device too.
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        torch.manual_seed(seed)
        init_method(full)
    return full


def _init_method(
    owners: dict[str, torch.nn.Module], owner: str, key: str, parameter: torch.Tensor
) -> InitMethod | None:
    """Finds how the script draws a weight."""
    module = owners[owner]
    parent, _, name = owner.rpartition(".")
    embedding: Any = owners.get(parent)
    if isinstance(embedding, LanguageModelEmbedding):
        return embedding.config.embedding_init_method
    if getattr(parameter, "shared_embedding", False):
        tied: Any = module
        return tied.config.embedding_init_method
    if isinstance(module, CLIPViTModel) and key == "class_token":
        return torch.nn.init.normal_
    # Elsewhere torch's own layers may hold weights that were trained before.
    if isinstance(owners.get(parent), MegatronModule):
        if isinstance(module, torch.nn.Embedding):
            return torch.nn.init.normal_
        if isinstance(module, torch.nn.Conv1d | torch.nn.Conv2d | torch.nn.Linear):
            return _fan_in_init(module)
    config: Any = getattr(module, "config", None)
    if config is None or key != "weight":
        return None
    # A wrapper, as of adapters, may stand between a linear layer and its name.
    wrapped = parent.rpartition(".")[2] in _OUTPUT_LINEARS
    whole = parameter.shape[0] == config.hidden_size
    if name in _OUTPUT_LINEARS or (wrapped and whole):
        return config.output_layer_init_method
    return config.init_method


def _fan_in_init(module: torch.nn.Conv1d | torch.nn.Conv2d | torch.nn.Linear) -> InitMethod:
    """torch's default for weight and bias alike: uniform within 1/sqrt(fan_in)."""
    bound = module.weight[0].numel() ** -0.5
    return lambda tensor: torch.nn.init.uniform_(tensor, -bound, bound)
