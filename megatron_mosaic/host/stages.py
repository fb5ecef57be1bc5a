"""Several stages of a module on one rank, as the one model that is wrapped and optimized."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import unwrap_model

MixedPrecisionWrapper = Callable[[TransformerConfig, Any], Any]


class ModuleStages(MegatronModule):
    """Holds the stages of a module on one rank. They run one by one, it never does.

    Megatron wraps every stage alone; its optimizer of several modules takes one model for each.

    Args:
        stages: The stages, ascending.
        collection: Groups of the module.
    """

    def __init__(
        self, stages: Sequence[torch.nn.Module], *, collection: ProcessGroupCollection
    ) -> None:
        first: Any = stages[0]
        super().__init__(config=first.config)
        self.stages = torch.nn.ModuleList(stages)
        self.pg_collection = collection
        # Megatron looks for whoever has tied embeddings by the first of these names.
        self.pre_process, self.post_process = True, True
        self.share_embeddings_and_output_weights: bool = getattr(
            first, "share_embeddings_and_output_weights", False
        )

    def shared_embedding_or_output_weight(self) -> torch.nn.Parameter | None:
        """Returns this rank's copy of tied embeddings, if one of its stages has any."""
        stages: list[Any] = unwrap_model(list(self.stages))
        ends = [
            stage for stage in (stages[0], stages[-1]) if stage.pre_process or stage.post_process
        ]
        return ends[0].shared_embedding_or_output_weight() if ends else None


def as_one_module(
    stages: Sequence[torch.nn.Module], *, collection: ProcessGroupCollection
) -> torch.nn.Module:
    """Returns what Megatron wraps: the stage itself where there is one."""
    return stages[0] if len(stages) == 1 else ModuleStages(stages, collection=collection)


def each_in_precision(wrapper: MixedPrecisionWrapper | None) -> MixedPrecisionWrapper | None:
    """Makes Megatron's wrapper of half precision one of every stage."""
    if wrapper is None:
        return None

    def wrap(config: TransformerConfig, module: torch.nn.Module) -> torch.nn.Module:
        if not isinstance(module, ModuleStages):
            return wrapper(config, module)
        owners: list[Any] = list(module.stages)
        module.stages = torch.nn.ModuleList([wrapper(each.config, each) for each in owners])
        return module

    return wrap


def stages_in(wrapped: torch.nn.Module) -> list[torch.nn.Module]:
    """Returns what runs of a wrapped module: its stages, or itself where it is the only one."""
    inner = unwrap_model(wrapped)
    return list(inner.stages) if isinstance(inner, ModuleStages) else [wrapped]


def tie_embeddings(stages: Sequence[torch.nn.Module]) -> None:
    """Lets the last stage of a language model on one rank use tied embeddings of the first.

    On two ranks Megatron gives the last stage a copy and adds up the gradients of both. Here it is
    as in a model of one stage: the weight is trained and saved once.

    Args:
        stages: All stages of the module, ascending.
    """
    first, last = _language_of(stages[0]), _language_of(stages[-1])
    if first is None or last is None or not first.share_embeddings_and_output_weights:
        return
    weight = first.shared_embedding_or_output_weight()
    # As Megatron marks it where it is shared within a stage: there is no copy to keep equal.
    weight.shared_embedding, weight.zero_out_wgrad = False, True
    last.output_layer.weight = None
    last.shared_embedding_or_output_weight = first.shared_embedding_or_output_weight
    last.tie_embeddings_and_output_weights_state_dict = _nothing_to_tie


def _nothing_to_tie(*unused: Any, **also_unused: Any) -> None:
    """The last stage has no copy of its own that a checkpoint would hold."""


def _language_of(stage: torch.nn.Module) -> Any:
    found: Iterator[Any] = (part for part in stage.modules() if isinstance(part, LanguageModule))
    return next(found, None)
