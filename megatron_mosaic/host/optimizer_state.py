"""Optimizer states under the names that a run without a plan gives them.

Megatron's optimizer of several modules saves each module's states under the module's name, and
what is common to all (the parameter groups) once for each module: only a run with the same
modules can read that. Here states are named after their weights alone, and the common part is one,
so a checkpoint of a plan is one of a stock run, and the other way round.
"""

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import extract_matching_values
from megatron.core.dist_checkpointing.mapping import ShardedBase
from megatron.core.models.mimo.optimizer import MimoOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import (
    ChainedOptimizer,
    MixedPrecisionOptimizer,
    param_group_identifier_keys,
)
from megatron.core.optimizer.optimizer_config import OptimizerConfig

from megatron_mosaic.errors import HostError

_MODULES = "mosaic_modules"
_GROUPS = "param_groups"
_MASTER_WEIGHTS = "fp32_from_fp16_params"
_SETTINGS = ("param_state_sharding_type", "grad_scaler")


class LayoutFreeOptimizer(MimoOptimizer):
    """The modules' optimizers, whose saved states do not tell that there are several.

    Args:
        module_infos: Optimizer and groups of every module.
        config: Megatron's configuration.
        group: Process group of all ranks, for objects of the CPU.
    """

    def __init__(
        self, module_infos: dict[str, Any], config: OptimizerConfig, *, group: dist.ProcessGroup
    ) -> None:
        super().__init__(module_infos, config)
        self._group = group
        # A rank without an optimizer takes part when the others put together what is common.
        self.is_stub_optimizer = False

    def sharded_state_dict(
        self, model_sharded_state_dict: dict[str, Any], is_loading: bool = False, **kwargs: Any
    ) -> dict[str, Any]:
        """Maps every module's states under the names of its weights.

        Note:
            Collective over the world, unless it is for loading.
        """
        sharded, plain = {}, []
        for name, optimizer in self._active():
            states = optimizer.sharded_state_dict(model_sharded_state_dict, is_loading, **kwargs)
            sharded[name], _ = extract_matching_values(
                states, lambda value: isinstance(value, ShardedBase), return_lists_as_dicts=True
            )
            plain.append([_plain(part) for part in _parts(states, optimizer)])
        modules = {_MODULES: sharded} if sharded else {}
        return modules if is_loading else modules | self._common_of_all(plain)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Gives every module its states, and what is common to all."""
        loaded = state_dict.pop(_MODULES, {})
        common = _common_parts(state_dict)
        for name, optimizer in self._active():
            inner = _inner(optimizer)
            parts = _parts(loaded.get(name, {}), optimizer)
            for part, own in zip(parts, inner, strict=True):
                _complete(part, own, common, module=name)
            states = dict(enumerate(parts)) if len(inner) > 1 else parts[0]
            optimizer.load_state_dict(states)

    def _active(self) -> Iterator[tuple[str, Any]]:
        for name, info in self.module_infos.items():
            if info.is_active and info.optimizer is not None:
                yield name, info.optimizer

    def _common_of_all(self, plain: list[list[dict[str, Any]]]) -> dict[str, Any]:
        """Puts together what is common, in the form that a stock optimizer would save."""
        gathered: list[Any] = [None] * dist.get_world_size(self._group)
        dist.all_gather_object(gathered, plain, group=self._group)
        modules = [module for of_rank in gathered for module in of_rank]
        num_parts = max(map(len, modules), default=0)
        merged: dict[Any, Any] = {
            index: _merged([module[index] for module in modules if index < len(module)])
            for index in range(num_parts)
        }
        return merged if num_parts > 1 else merged.get(0, {})


def _inner(optimizer: Any) -> list[Any]:
    """Optimizers of one module: that of its experts is apart."""
    return optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]


def _parts(states: dict[Any, Any], optimizer: Any) -> list[dict[str, Any]]:
    """States of each of a module's optimizers."""
    inner = _inner(optimizer)
    if len(inner) == 1:
        return [states]
    return [states.get(index, {}) for index in range(len(inner))]


def _plain(part: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint keeps beside the tensors of an optimizer.

    Parameters' numbers are left out: they count the parameters of one rank.
    """
    kept = {key: part[key] for key in _SETTINGS if key in part}
    own = part.get("optimizer", part)
    groups = [group | ({"params": []} if "params" in group else {}) for group in own[_GROUPS]]
    torch_state: dict[str, Any] = {_GROUPS: deepcopy(groups)}
    if "common_step" in own.get("state", {}):
        torch_state["state"] = {"common_step": own["state"]["common_step"]}
    return kept | ({"optimizer": torch_state} if "optimizer" in part else torch_state)


def _merged(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Joins the parameter groups of all modules; all else is equal in them."""
    merged: dict[str, Any] = {}
    for part in parts:
        merged = part | merged
    groups: dict[tuple, dict[str, Any]] = {}
    for part in parts:
        for group in part.get("optimizer", part)[_GROUPS]:
            known = groups.setdefault(_identifier(group), group)
            # Megatron counts no steps of a group in which a rank has no parameter.
            known.update({key: value for key, value in group.items() if key not in known})
    merged.get("optimizer", merged)[_GROUPS] = list(groups.values())
    return merged


def _common_parts(state_dict: dict[Any, Any]) -> list[dict[str, Any]]:
    numbered = [
        state_dict[key] for key in sorted(key for key in state_dict if isinstance(key, int))
    ]
    return numbered or [state_dict]


def _complete(
    part: dict[str, Any], optimizer: Any, common: Sequence[dict[str, Any]], *, module: str
) -> None:
    """Adds to loaded tensors what is common, as the module's optimizer expects it.

    Raises:
        HostError: The checkpoint lacks a group of parameters.
    """
    current = optimizer.optimizer.state_dict()[_GROUPS]
    owners = [each.get("optimizer", each) for each in common]
    saved = {_identifier(group): group for owner in owners for group in owner.get(_GROUPS, ())}
    for key in _SETTINGS:
        part.update([(key, each[key]) for each in common if key in each][:1])
    mixed = isinstance(optimizer, MixedPrecisionOptimizer)
    owner = part.setdefault("optimizer", {}) if mixed else part
    owner[_GROUPS] = [_group(group, saved, module=module) for group in current]
    if not isinstance(optimizer, DistributedOptimizer):
        # These keep states of whole parameters, in torch's own form.
        steps = [each["state"] for each in owners if "common_step" in each.get("state", {})]
        owner.setdefault("state", {}).update(*steps[:1])
        _list_master_weights(part, current)


def _list_master_weights(part: dict[str, Any], current: Sequence[Mapping[str, Any]]) -> None:
    """Turns them, by number of group and of parameter, into lists of all groups."""
    if _MASTER_WEIGHTS in part:
        loaded = part[_MASTER_WEIGHTS]
        part[_MASTER_WEIGHTS] = [
            [loaded[index][number] for number in range(len(group["params"]))]
            for index, group in enumerate(current)
        ]


def _group(
    current: dict[str, Any], saved: Mapping[tuple, dict[str, Any]], *, module: str
) -> dict[str, Any]:
    found = saved.get(_identifier(current))
    if found is None and current["params"]:
        kind = {key: current[key] for key in param_group_identifier_keys if key in current}
        raise HostError(
            f"checkpoint: optimizer.param_groups={len(saved)} must include {kind}, as "
            f"modules.{module} has; give the options of weight decay and learning rate with which "
            f"it was saved, or --no-load-optim"
        )
    return deepcopy(found or current) | {"params": current["params"]}


def _identifier(group: Mapping[str, Any]) -> tuple:
    """What tells parameter groups apart, as Megatron does it."""
    return tuple(group.get(key, group.get(f"pre_{key}")) for key in param_group_identifier_keys)
