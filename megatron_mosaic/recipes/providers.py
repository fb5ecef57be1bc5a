"""Providers of Megatron-Bridge that carry a plan. Importing this needs Bridge."""

# Megatron-Bridge is optional.
# pyright: reportMissingImports=false

from dataclasses import dataclass, fields
from typing import Any, Self

from megatron.bridge.models.megatron_mimo import MegatronMIMOProvider
from megatron.bridge.models.qwen_vl.qwen3_vl_provider import Qwen3VLMoEModelProvider
from megatron.bridge.models.qwen_vl.qwen25_vl_provider import Qwen25VLModelProvider

from megatron_mosaic.errors import HostError, LayoutError, PlanError
from megatron_mosaic.layout.plan import Plan
from megatron_mosaic.planner.emit.bridge import module_parallelisms
from megatron_mosaic.recipes.bridge import from_bridge, to_bridge

LAUNCH = "python -m megatron_mosaic.run SCRIPT --mosaic-plan"


@dataclass
class PlanCarrier:
    """What every provider with a plan has in common.

    Bridge's own loop runs the plans that Bridge can say; the others run in Megatron's loop under
    ``megatron_mosaic.run``, and here are refused rather than run as something else.

    Args:
        mosaic_plan: Plan file.
    """

    mosaic_plan: str = ""

    def plan(self) -> Plan:
        """Reads the plan."""
        return Plan.load(self.mosaic_plan)

    def provide_distributed_model(self, *args: Any, **kwargs: Any) -> list[Any]:
        """Builds the model where Bridge's loop can run the plan.

        Raises:
            HostError: It cannot.
        """
        try:
            module_parallelisms(self.plan())
        except PlanError as error:
            raise HostError(
                f"{self.mosaic_plan}: {error} in Megatron-Bridge's loop; run it with "
                f"'{LAUNCH} {self.mosaic_plan}'"
            ) from None
        return super().provide_distributed_model(*args, **kwargs)  # type: ignore[misc]


@dataclass
class MosaicProvider(PlanCarrier, MegatronMIMOProvider):
    """A model of specs, with a module for each module of the plan."""

    def __post_init__(self) -> None:
        if self.mosaic_plan and self.megatron_mimo_parallelism_config is None:
            plan = self.plan()
            self.topology = topology_of(plan)
            try:
                self.megatron_mimo_parallelism_config = to_bridge(plan)
            except PlanError:
                # Left out; `provide_distributed_model` says why where someone asks for a model.
                self.megatron_mimo_parallelism_config = None
        super().__post_init__()

    def check(self, *, micro_batch_size: int, global_batch_size: int) -> None:
        """Checks that the parallelism of Bridge, which a user can change, is still the plan's.

        Raises:
            LayoutError: It is not.
        """
        plan, config = self.plan(), self.megatron_mimo_parallelism_config
        if config is None:
            return
        shown = from_bridge(
            config, micro_batch_size=micro_batch_size, global_batch_size=global_batch_size
        )
        for name, placement in plan.modules.items():
            other = shown.modules.get(name)
            if other is None or (other.ranks, other.shape) != (placement.ranks, placement.shape):
                raise LayoutError(
                    f"model: module_parallelisms={name} must equal {self.mosaic_plan}; change the "
                    f"plan, not the configuration"
                )


@dataclass
class _StandardCarrier(PlanCarrier):
    @classmethod
    def of(cls, provider: Any, *, mosaic_plan: str) -> Self:
        """Makes one with everything that Bridge's own provider of the model says.

        The sizes that Bridge knows are the plan's for the language model.
        """
        values = {each.name: getattr(provider, each.name) for each in fields(provider) if each.init}
        language = Plan.load(mosaic_plan).language
        values |= language.sizes() | {"sequence_parallel": language.sequence_parallel}
        values.pop("data_parallel_size", None)
        if language.splits_experts:
            values["expert_model_parallel_size"] = language.expert_shape.ep
            values["expert_tensor_parallel_size"] = language.expert_shape.expt_tp
        return cls(**values, mosaic_plan=mosaic_plan)


@dataclass
class MosaicQwen25VLProvider(_StandardCarrier, Qwen25VLModelProvider):
    """Qwen2.5-VL with a plan."""


@dataclass
class MosaicQwen3VLMoEProvider(_StandardCarrier, Qwen3VLMoEModelProvider):
    """Qwen3-VL with experts and a plan."""


def topology_of(plan: Plan) -> dict[str, list[str]]:
    """Which modules take each module's rows, as Bridge writes it."""
    return {
        name: [destination for source, destination in plan.edges if source == name]
        for name in plan.modules
    }
