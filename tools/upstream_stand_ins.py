"""Stand-ins for what Megatron's tests use and a machine need not have.

Tests that build layers from TransformerEngine take the local ones where it is not installed;
packages that tests import for a function or two are replaced by as much; and without a GPU process
groups can be created as carelessly as NCCL allows.
"""

import functools
import importlib
import importlib.util
import sys
import unittest.mock
from collections import Counter
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist

_GPT = "megatron.core.models.gpt.gpt_layer_specs"
_VIT = "megatron.core.models.vision.vit_layer_specs"
_TE = "megatron.core.extensions.transformer_engine"
_LINEAR = "megatron.core.tensor_parallel.layers"
LOCAL_LAYERS = {
    f"{_GPT}:get_gpt_layer_with_transformer_engine_spec": f"{_GPT}:get_gpt_layer_local_spec",
    f"{_GPT}:get_gpt_layer_with_transformer_engine_submodules": (
        f"{_GPT}:get_gpt_layer_local_submodules"
    ),
    f"{_VIT}:get_vit_layer_with_transformer_engine_spec": f"{_VIT}:get_vit_layer_with_local_spec",
    f"{_TE}:TEColumnParallelLinear": f"{_LINEAR}:ColumnParallelLinear",
    f"{_TE}:TERowParallelLinear": f"{_LINEAR}:RowParallelLinear",
}


def install_stand_ins(*, member_groups: bool) -> None:
    """Puts stand-ins where something is not installed. Call it before the tests are imported.

    Args:
        member_groups: Whether, on CPU, a process group is created by its members alone.
    """
    if importlib.util.find_spec("transformer_engine") is None:
        for symbol, stand_in in LOCAL_LAYERS.items():
            _set(symbol, _get(stand_in))
        _prepare_local_layers_with_grids()
    if member_groups and not torch.cuda.is_available():
        _create_groups_among_members()
    for name, module in _packages().items():
        if importlib.util.find_spec(name.partition(".")[0]) is None:
            sys.modules[name] = module


def _packages() -> dict[str, ModuleType]:
    mocker = ModuleType("pytest_mock")
    mocker.mocker = None  # type: ignore[attr-defined]  # imported by name; the fixture is ours
    return {"mock": unittest.mock, "pytest_mock": mocker}


def _create_groups_among_members() -> None:
    """Lets members alone create a group, under a name made from its ranks.

    Some tests have each rank create the groups that it is in, and no others. NCCL, which connects
    late, does not mind that ranks then number different groups alike; gloo connects at once, and
    to the wrong peers.
    """
    created: Counter[tuple[int, ...]] = Counter()

    def name_of(ranks: Sequence[int]) -> str:
        created[tuple(ranks)] += 1
        return f"{list(ranks)}/{created[tuple(ranks)]}"

    def among_members(new_group: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(new_group)
        def create(ranks: Sequence[int] | None = None, **options: Any) -> Any:
            options["use_local_synchronization"] = ranks is not None
            group = new_group(ranks, **options)
            return dist.GroupMember.NON_GROUP_MEMBER if group is None else group

        return create

    # torch's own name for such a group depends on how many groups a rank has.
    dist.distributed_c10d._hash_ranks_to_str = name_of
    for module in ("torch.distributed", "torch.distributed.distributed_c10d"):
        _set(f"{module}:new_group", among_members(_get(f"{module}:new_group")))


def _prepare_local_layers_with_grids() -> None:
    """Makes a grid prepare what TransformerEngine's layers do without and local ones use.

    Tests that lay out ranks with a grid alone never call what would do it.
    """
    symbol = "megatron.core.hyper_comm_grid:HyperCommGrid.__init__"
    original: Callable[..., None] = _get(symbol)

    @functools.wraps(original)
    def construct(self: Any, *args: Any, **kwargs: Any) -> None:
        from megatron.core import parallel_state
        from megatron.core.tensor_parallel import random

        original(self, *args, **kwargs)
        if not random.get_cuda_rng_tracker().get_states():
            random.model_parallel_cuda_manual_seed(1, tp_rank=0, ep_rank=0, etp_rank=0)
        if parallel_state._GLOBAL_MEMORY_BUFFER is None:
            parallel_state._set_global_memory_buffer()

    _set(symbol, construct)


def _get(symbol: str) -> Any:
    module, _, path = symbol.partition(":")
    return functools.reduce(getattr, path.split("."), importlib.import_module(module))


def _set(symbol: str, value: Any) -> None:
    module, _, path = symbol.partition(":")
    *owners, name = path.split(".")
    setattr(functools.reduce(getattr, owners, importlib.import_module(module)), name, value)
