"""What the modules of a plan are of a MimoModel.

A modality is a module of its name. If it has several encoders, each may be a module
``<modality>_<encoder>`` instead. What a modality is shows in the class of its spec, by static
methods that upstream does not know:

``encoder_rows(num_tokens) -> dict``
    Rows of each encoder for so many special tokens of a sample; needed where encoders are modules
    of their own.
``output_widths(hidden_size) -> dict``
    The modality returns a dict of tensors with equal rows, of these names and widths.
``takes_hidden_states(input_ids) -> mask``
    The modality is an output: it is fed by the language model, and has a loss of its own. The
    mask ``[b, s]`` says whose hidden states, behind the decoder's last norm, it takes. Its
    ``forward(encoder_inputs, hidden_states)`` gets them as rows ``[n, h]``, sample after sample.

With an output, the model's ``forward`` returns a dict of what its modules returned, by their
names and of those that are there; the script's loss function adds up the losses of these, and
divides them by the same number of tokens in every module.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.models.mimo.config import MimoModelConfig
from megatron.core.transformer.spec_utils import ModuleSpec

from megatron_mosaic.errors import PlanError
from megatron_mosaic.layout.placement import LANGUAGE, ModulePlacement
from megatron_mosaic.layout.plan import Plan


@dataclass(frozen=True, kw_only=True, slots=True)
class ModalityPart:
    """What one module of a plan is of a modality.

    Args:
        modality: The modality.
        submodules: Class of the modality.
        encoders: Its encoders in this module.
        whole: Whether they are all of them, with the projection behind them.
    """

    modality: str
    submodules: Any
    encoders: tuple[str, ...]
    whole: bool = True

    @property
    def is_output(self) -> bool:
        """Whether the language model feeds it, not it the language model."""
        return hasattr(self.submodules, "takes_hidden_states")

    def hidden_states_taken(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Tells of which tokens ``[b, s]`` an output takes the hidden states."""
        return self.submodules.takes_hidden_states(input_ids)

    def rows_for(self, num_tokens: int) -> int:
        """Rows that the module makes for so many special tokens of a sample."""
        if self.whole:
            return num_tokens
        (encoder,) = self.encoders
        return self.submodules.encoder_rows(num_tokens)[encoder]

    def output_widths(self, hidden_size: int) -> Mapping[str, int] | None:
        """Tensors that the module makes, with their widths; None if it makes a single one."""
        declared = getattr(self.submodules, "output_widths", None)
        return declared(hidden_size) if declared is not None and self.whole else None


def modality_parts(config: MimoModelConfig, plan: Plan) -> dict[str, ModalityPart]:
    """Tells what every module of a plan, beside the language model, is of a MimoModel.

    Args:
        config: The script's.
        plan: The plan.

    Raises:
        PlanError: The plan has other modules or edges than the model.
    """
    parts: dict[str, ModalityPart] = {}
    for modality, spec in config.modality_submodules_spec.items():
        parts |= _parts_of_modality(modality, spec, plan)
    legal = sorted([*parts, LANGUAGE])
    if not parts or sorted(plan.modules) != legal:
        raise PlanError(
            f"modules: names={sorted(plan.modules)} must be {legal}, as the script's MimoModel has "
            f"them, a modality or each of its encoders; rename the modules of the plan"
        )
    return parts


def check_sizes(placement: ModulePlacement) -> None:
    """Checks that a module of a MimoModel can be split as a plan says.

    Raises:
        PlanError: It asks for what this version can do with other models only.
    """
    where, reason = f"modules.{placement.name}", "not supported by this version with MimoModel"
    if placement.attention is not None:
        raise PlanError(
            f"{where}: attention.mask={placement.attention.mask} must not stand in the plan: masks "
            f"are {reason}, whose script alone knows where its items lie; remove the key"
        )
    if placement.context_parallel_size > 1:
        raise PlanError(
            f"{where}: context_parallel_size={placement.context_parallel_size} must be 1: context "
            f"parallelism is {reason}; give its ranks to another size"
        )
    if placement.name != LANGUAGE and (placement.num_stages > 1 or placement.sequence_parallel):
        stages = f"pipeline_model_parallel_size={placement.pipeline_model_parallel_size}"
        virtual = placement.virtual_pipeline_model_parallel_size
        if virtual > 1:
            stages = f"virtual_pipeline_model_parallel_size={virtual}"
        raise PlanError(
            f"{where}: {stages} must be 1, and sequence_parallel "
            f"false: they are {reason} beside language; raise another size instead"
        )


def split_modalities(parts: Mapping[str, ModalityPart]) -> list[str]:
    """Modalities whose encoders are modules of their own, each once."""
    return list(dict.fromkeys(part.modality for part in parts.values() if not part.whole))


def _parts_of_modality(modality: str, spec: ModuleSpec, plan: Plan) -> dict[str, ModalityPart]:
    encoders = tuple((spec.submodules or {}).get("encoders", {}))
    names = {f"{modality}_{encoder}": encoder for encoder in encoders}
    if len(names) == 1 or modality in plan.modules or not set(names) & set(plan.modules):
        return {
            modality: ModalityPart(modality=modality, submodules=spec.module, encoders=encoders)
        }
    if not hasattr(spec.module, "encoder_rows"):
        raise PlanError(
            f"modules: encoders={sorted(names)} must be one module {modality}, for "
            f"{spec.module.__name__} does not say how many rows each has; define its static "
            f"method encoder_rows(num_tokens), or rename the module"
        )
    return {
        name: ModalityPart(
            modality=modality, submodules=spec.module, encoders=(encoder,), whole=False
        )
        for name, encoder in names.items()
    }
