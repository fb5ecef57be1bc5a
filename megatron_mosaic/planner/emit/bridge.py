"""Configuration of Megatron-Bridge: as Python, as fields, and back."""

from collections.abc import Iterator, Mapping
from math import prod
from typing import Any

from megatron_mosaic.errors import PlanError
from megatron_mosaic.layout.placement import LANGUAGE, ModulePlacement
from megatron_mosaic.layout.plan import Plan, ScheduleChoice
from megatron_mosaic.planner.emit.emission import (
    Emission,
    InexpressibleError,
    Launch,
    check_pipelined,
    check_tiling,
    refuse_attention_and_items,
    refuse_outputs,
    refuse_uneven_stages,
    refuse_virtual_stages,
)

_DENSE = (
    "tensor_model_parallel_size",
    "context_parallel_size",
    "data_parallel_size",
    "pipeline_model_parallel_size",
)
_EXPERT = ("expert_model_parallel_size", "expert_tensor_parallel_size")

_IMPORT = """\
from megatron.bridge.models.megatron_mimo import (
    MegatronMIMOParallelismConfig,
    ModuleParallelismConfig,
)
"""


def emit_bridge(plan: Plan, launch: Launch) -> Emission:
    """Writes the parallelism of a ``MegatronMIMOProvider`` and the batch of its ``cfg``."""
    modules = module_parallelisms(plan)
    lines = [_IMPORT, "parallelism = MegatronMIMOParallelismConfig(", "    module_parallelisms={"]
    for name, fields in modules.items():
        lines.append(f'        "{name}": ModuleParallelismConfig(')
        lines += [f"            {field}={value}," for field, value in fields.items()]
        lines.append("        ),")
    lines += [
        "    },",
        ")",
        f"cfg.train.micro_batch_size = {samples_of_microbatch(plan)}  # of all replicas",
        f"cfg.train.global_batch_size = {plan.global_batch_size}",
    ]
    return Emission(text="\n".join(lines), notes=tuple(_notes(plan)))


def samples_of_microbatch(plan: Plan) -> int:
    """Samples of a microbatch as Bridge counts them: of all replicas of the language model.

    Source:
        Megatron-Bridge 067f987df, src/megatron/bridge/data/megatron_mimo/dp_utils.py: each module
        cuts them for its own replicas.
    """
    return plan.micro_batch_size * plan.language.data_parallel_size


def module_parallelisms(plan: Plan) -> dict[str, dict[str, int]]:
    """Fields of the ``ModuleParallelismConfig`` of each module, without those at their defaults.

    Raises:
        InexpressibleError: Bridge has no words for something in the plan.

    Source:
        Megatron-Bridge 067f987df and 0.6.2, models/megatron_mimo/megatron_mimo_config.py for
        fields and rules.
    """
    refuse_outputs(plan)
    refuse_attention_and_items(plan)
    if not plan.encoders:
        raise InexpressibleError("modules: names=['language'] must have an encoder beside language")
    check_tiling(plan)
    check_pipelined(plan)
    for placement in plan.modules.values():
        _check_module(placement, plan.language, samples_of_microbatch(plan))
    return {name: dict(_fields(placement)) for name, placement in plan.modules.items()}


def plan_of_parallelisms(
    modules: Mapping[str, Mapping[str, int | None]],
    *,
    micro_batch_size: int,
    global_batch_size: int,
    where: str = "module_parallelisms",
) -> Plan:
    """Makes the plan that Bridge's fields describe: 1F1B of modules side by side.

    Args:
        modules: Fields of the ``ModuleParallelismConfig`` of each module.
        micro_batch_size: Samples of a microbatch of all replicas, as Bridge counts them.
        global_batch_size: Samples of a step.
        where: Name of the fields in messages.

    Raises:
        PlanError: There is no language model, a size is unknown, or samples cannot be cut.
        LayoutError: Sizes or ranks contradict each other.
    """
    if LANGUAGE not in modules:
        raise PlanError(
            f"{where}: names={sorted(modules)} must include {LANGUAGE}; name the language model so"
        )
    replicas = modules[LANGUAGE].get("data_parallel_size") or 0
    if replicas < 1 or micro_batch_size % replicas:
        raise PlanError(
            f"{where}.{LANGUAGE}: data_parallel_size={replicas} must divide the "
            f"{micro_batch_size} samples of a microbatch of all replicas; change one of the two"
        )
    placements = {
        name: _placement(name, fields, where=f"{where}.{name}") for name, fields in modules.items()
    }
    return Plan(
        world_size=max(placement.ranks[-1] for placement in placements.values()) + 1,
        global_batch_size=global_batch_size,
        micro_batch_size=micro_batch_size // replicas,
        modules=placements,
        edges=tuple((name, LANGUAGE) for name in sorted(placements) if name != LANGUAGE),
        schedule=ScheduleChoice(kind="1f1b"),
    )


def _placement(name: str, fields: Mapping[str, int | None], *, where: str) -> ModulePlacement:
    """One module, on as many ranks from its offset on as its sizes multiply to."""
    sizes = dict(fields)
    offset = sizes.pop("rank_offset", 0) or 0
    if unknown := sorted(set(sizes) - {*_DENSE, *_EXPERT}):
        raise PlanError(
            f"{where}: fields={unknown} must be among {', '.join((*_DENSE, *_EXPERT))}; remove them"
        )
    if offset < 0:
        raise PlanError(f"{where}: rank_offset={offset} must be >= 0; give the first rank")
    dense: dict[str, Any] = {field: sizes.get(field, 1) for field in _DENSE}
    for field, size in dense.items():
        if size is None or size < 1:
            raise PlanError(f"{where}: {field}={size} must be >= 1; give a positive size")
    if (sizes.get("expert_model_parallel_size") or 1) > 1:
        dense |= {field: sizes.get(field, 1) for field in _EXPERT}
    return ModulePlacement(
        name=name,
        ranks=tuple(range(offset, offset + prod(dense[field] for field in _DENSE))),
        **dense,
    )


def _check_module(placement: ModulePlacement, language: ModulePlacement, samples: int) -> None:
    where = f"modules.{placement.name}:"
    tp, cp, dp, _ = placement.shape
    if tp & (tp - 1):
        raise InexpressibleError(f"{where} tensor_model_parallel_size={tp} must be a power of two")
    if cp != 1:
        raise InexpressibleError(f"{where} context_parallel_size={cp} must be 1")
    other = language.data_parallel_size
    if dp % other and other % dp:
        raise InexpressibleError(
            f"{where} data_parallel_size={dp} must divide {other} of language, or be its multiple"
        )
    if samples % dp:
        raise InexpressibleError(
            f"{where} data_parallel_size={dp} must divide the {samples} samples of a microbatch"
        )
    if placement.recompute is not None:
        raise InexpressibleError(f"{where} recompute={placement.recompute} must be absent")
    if placement.sequence_parallel:
        raise InexpressibleError(f"{where} sequence_parallel=true must be false")
    refuse_uneven_stages(placement)
    refuse_virtual_stages(placement)


def _fields(placement: ModulePlacement) -> Iterator[tuple[str, int]]:
    for field, size in placement.sizes().items():
        if size > 1 or field == "data_parallel_size":
            yield field, size
    if placement.splits_experts:
        yield "expert_model_parallel_size", placement.expert_shape.ep
        yield "expert_tensor_parallel_size", placement.expert_shape.expt_tp
    yield "rank_offset", min(placement.ranks)


def _notes(plan: Plan) -> Iterator[str]:
    for name, placement in plan.modules.items():
        if placement.trainable is not None:
            yield (
                f"modules.{name}: trainable={list(placement.trainable)} is for the provider's "
                f"freeze_* fields to keep"
            )
