"""Plans and the parallelism of Megatron-Bridge, there and back."""

# Megatron-Bridge is optional.
# pyright: reportMissingImports=false

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from megatron_mosaic.errors import HostError, PlanError
from megatron_mosaic.layout.plan import Plan
from megatron_mosaic.planner.emit.bridge import module_parallelisms, plan_of_parallelisms
from megatron_mosaic.planner.emit.emission import InexpressibleError

if TYPE_CHECKING:
    from megatron.bridge.models.megatron_mimo import MegatronMIMOParallelismConfig

INSTALL = 'pip install "megatron-mosaic[bridge]"'


def require_bridge() -> None:
    """Checks that Megatron-Bridge can be imported.

    Raises:
        HostError: It is not installed, or something that it imports is not.
    """
    try:
        import megatron.bridge
    except ImportError as error:
        # `megatron.bridge` is part of Bridge's own packages; everything else it depends on.
        missing = error.name or "megatron.bridge"
        raise HostError(
            f"recipes: package={missing} must be installed to make a configuration of "
            f"Megatron-Bridge; run '{INSTALL}', with a GPU's transformer-engine"
        ) from None
    del megatron


def to_bridge(plan: Plan) -> "MegatronMIMOParallelismConfig":
    """Makes Bridge's parallelism of a plan, validated by Bridge.

    Raises:
        HostError: Bridge is not installed.
        PlanError: Bridge has no words for something in the plan, or refuses it.
    """
    try:
        modules = module_parallelisms(plan)
    except InexpressibleError as error:
        raise PlanError(
            f"plan: {error} for Megatron-Bridge; run the plan with 'python -m megatron_mosaic.run'"
        ) from None
    require_bridge()
    from megatron.bridge.models.megatron_mimo import (
        MegatronMIMOParallelismConfig,
        ModuleParallelismConfig,
    )

    config = MegatronMIMOParallelismConfig(
        module_parallelisms={
            name: ModuleParallelismConfig(**fields) for name, fields in modules.items()
        }
    )
    try:
        config.finalize(plan.world_size)
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise PlanError(
            f"plan: modules={', '.join(modules)} must pass Bridge's validation ({reason}); "
            f"change the plan"
        ) from None
    return config


def from_bridge(
    config: "MegatronMIMOParallelismConfig | Any", *, micro_batch_size: int, global_batch_size: int
) -> Plan:
    """Makes the plan of a parallelism of Bridge.

    Args:
        config: Parallelism, with the data-parallel size of every module.
        micro_batch_size: ``cfg.train.micro_batch_size``, samples of all replicas.
        global_batch_size: ``cfg.train.global_batch_size``.

    Raises:
        PlanError: There is no language model, or samples cannot be cut.
        LayoutError: Sizes or ranks contradict each other.
    """
    return plan_of_parallelisms(
        {name: asdict(module) for name, module in config.module_parallelisms.items()},
        micro_batch_size=micro_batch_size,
        global_batch_size=global_batch_size,
    )
