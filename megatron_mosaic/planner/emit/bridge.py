"""Configuration of Megatron-Bridge, as Python."""

from collections.abc import Iterator

from megatron_mosaic.layout.placement import ModulePlacement
from megatron_mosaic.layout.plan import Plan
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

_IMPORT = """\
from megatron.bridge.models.megatron_mimo import (
    MegatronMIMOParallelismConfig,
    ModuleParallelismConfig,
)
"""


def emit_bridge(plan: Plan, launch: Launch) -> Emission:
    """Writes the parallelism of a ``MegatronMIMOProvider`` and the batch of its ``cfg``.

    Source:
        Megatron-Bridge 067f987df, src/megatron/bridge/models/megatron_mimo/megatron_mimo_config.py
        for fields and rules; data/megatron_mimo/dp_utils.py for the microbatch, which is that of
        all replicas and is cut by each module.
    """
    refuse_outputs(plan)
    refuse_attention_and_items(plan)
    if not plan.encoders:
        raise InexpressibleError("modules: names=['language'] must have an encoder beside language")
    check_tiling(plan)
    check_pipelined(plan)
    samples = plan.micro_batch_size * plan.language.data_parallel_size
    for placement in plan.modules.values():
        _check_module(placement, plan.language, samples)
    lines = [_IMPORT, "parallelism = MegatronMIMOParallelismConfig(", "    module_parallelisms={"]
    for name, placement in plan.modules.items():
        lines.append(f'        "{name}": ModuleParallelismConfig(')
        lines += [f"            {field}={value}," for field, value in _fields(placement)]
        lines.append("        ),")
    lines += [
        "    },",
        ")",
        f"cfg.train.micro_batch_size = {samples}  # of all replicas",
        f"cfg.train.global_batch_size = {plan.global_batch_size}",
    ]
    return Emission(text="\n".join(lines), notes=tuple(_notes(plan)))


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
