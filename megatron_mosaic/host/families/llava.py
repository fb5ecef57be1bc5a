"""LLaVAModel, the model of ``pretrain_vlm.py``, as two modules with layouts of their own.

Upstream's class can build either half: the vision encoder with its projector, or the language
model. Scripts ask for both, so while a module is built the constructor gets the half's flags.
"""

import argparse
import copy
import functools
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from megatron.core.models.multimodal.llava_model import LLaVAModel
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import unwrap_model

from megatron_mosaic.errors import HostError, PlanError
from megatron_mosaic.host.families.family import check_edges, facts_of, token_ids
from megatron_mosaic.host.groups import ModuleGroups
from megatron_mosaic.host.reports import encoder_flops
from megatron_mosaic.layout.model_facts import check_module
from megatron_mosaic.layout.placement import LANGUAGE, ModulePlacement
from megatron_mosaic.layout.plan import Plan

VISION = "vision"

# Where a part of the plan's ``trainable`` lies in the model.
PARTS: Mapping[str, Mapping[str, str]] = {
    VISION: {"encoder": "vision_model", "projector": "vision_projection"},
    LANGUAGE: {
        "embedding": "language_model.embedding",
        "decoder": "language_model.decoder",
        "output_layer": "language_model.output_layer",
    },
}


class LlavaFamily:
    """LLaVAModel: one vision encoder with its projector, and the language model."""

    model_class = LLaVAModel

    def building_one_module(
        self, groups: ModuleGroups, *, plan: Plan
    ) -> AbstractContextManager[None]:
        """Makes LLaVAModel build one half only."""
        return building_one_module(groups, plan=plan)

    def parts(self, model: torch.nn.Module, name: str) -> Mapping[str, str]:
        """Tells where the parts of a half lie."""
        return PARTS[name]

    def boundary(self, model: torch.nn.Module, name: str) -> "LlavaBoundary":
        """Returns the translator of a half."""
        return LlavaBoundary(model, name)


def check_modules(names: Sequence[str]) -> None:
    """Checks that a plan names the modules that the model has.

    Raises:
        PlanError: There is another module, or one is missing.
    """
    if sorted(names) != sorted((VISION, LANGUAGE)):
        raise PlanError(
            f"modules: names={sorted(names)} must be {sorted((VISION, LANGUAGE))} for LLaVAModel; "
            f"rename the modules of the plan"
        )


@contextmanager
def building_one_module(groups: ModuleGroups, *, plan: Plan) -> Iterator[None]:
    """Makes LLaVAModel build one module only, on that module's groups and sizes.

    ``pretrain_vlm.py`` hard-codes ``add_decoder=True`` and gives both halves the language
    model's sizes; there is no argument through which a launcher could say otherwise.
    """
    original = LLaVAModel.__init__
    signature = inspect.signature(original)

    @functools.wraps(original)
    def build_half(self: LLaVAModel, *args: Any, **kwargs: Any) -> None:
        check_modules(list(plan.modules))
        check_edges(plan)
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        bound.arguments.update(_overrides(bound.arguments, groups))
        original(*bound.args, **bound.kwargs)

    LLaVAModel.__init__ = build_half
    try:
        yield
    finally:
        LLaVAModel.__init__ = original


def _overrides(arguments: Mapping[str, Any], groups: ModuleGroups) -> dict[str, Any]:
    placement = groups.placement
    config = arguments[f"{placement.name}_transformer_config"]
    check_module(placement, facts_of(config))
    common = {"pg_collection": groups.collection}
    if placement.name == LANGUAGE:
        return common | {
            "language_transformer_config": retarget(config, placement),
            "add_encoder": False,
            "add_decoder": True,
            "pre_process": groups.is_first_stage,
            "post_process": groups.is_last_stage,
        }
    vision = retarget(config, placement)
    return common | {
        # The half's own config: DDP and the gradient rules read it from the model.
        "language_transformer_config": vision,
        "vision_transformer_config": vision,
        "vision_projection_config": retarget(arguments["vision_projection_config"], placement),
        "add_encoder": True,
        "add_decoder": False,
        "pre_process": True,
        "post_process": True,
    }


def retarget(config: TransformerConfig, placement: ModulePlacement) -> TransformerConfig:
    """Copies a config with the parallel sizes of a module."""
    config = copy.copy(config)
    stages = placement.pipeline_model_parallel_size
    config.tensor_model_parallel_size = placement.tensor_model_parallel_size
    config.context_parallel_size = placement.context_parallel_size
    config.pipeline_model_parallel_size = stages
    config.sequence_parallel = placement.sequence_parallel
    # The engine posts sends and goes on: an output must outlive its transfer.
    config.deallocate_pipeline_outputs = False
    config.pipeline_model_parallel_layout = None
    if placement.layers_per_stage is not None:
        rows = [["decoder"] * layers for layers in placement.layers_per_stage]
        rows[0].insert(0, "embedding")
        rows[-1].append("loss")
        config.pipeline_model_parallel_layout = PipelineParallelLayerLayout(rows, stages)
    if placement.name != LANGUAGE:
        # An encoder's gradient is a plain sum over its replicas; the engine scales it.
        config.calculate_per_token_loss = True
    return config


class LlavaBoundary:
    """Translates between LLaVA's tensors and boundary rows ``[rows, h]``.

    Args:
        model: A built half, which may be wrapped.
        name: Which one.
    """

    def __init__(self, model: torch.nn.Module, name: str) -> None:
        inner = unwrap_model(model)
        self.rows_per_image: int = inner.img_seq_len
        self.image_token: int = inner.image_token_index
        # Only the half with the encoder has a projection, and makes rows.
        self.width: int = (inner.vision_projection or inner).config.hidden_size
        self.makes_loss = name == LANGUAGE
        self._name = name

    def rows_of(self, output: torch.Tensor) -> torch.Tensor:
        """Flattens image embeddings ``[rows, images, h]`` into ``[images * rows, h]``."""
        return output.transpose(0, 1).reshape(-1, output.shape[-1])

    def rows_beside_loss(self) -> None:
        """Returns None: nothing is fed by the language model."""
        return None

    def hidden_of(self, output: torch.Tensor) -> torch.Tensor:
        """Leaves a hidden state as it is."""
        return output

    def inputs_of(self, received: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Inverse of :meth:`rows_of`; no image gives LLaVA's empty ``[0, 0, h]``."""
        if self._name in received:
            return received[self._name]
        (embeddings,) = received.values()
        if embeddings.shape[0] == 0:
            return embeddings.reshape(0, 0, embeddings.shape[-1])
        images = embeddings.reshape(-1, self.rows_per_image, embeddings.shape[-1])
        return images.transpose(0, 1).contiguous()

    def row_counts(self, batch: Mapping[str, torch.Tensor]) -> Mapping[str, Sequence[int]]:
        """Counts the image rows of every sample of a batch by its image tokens."""
        images = images_per_sample(batch, image_token=self.image_token)
        return {VISION: [count * self.rows_per_image for count in images]}

    def flops_per_row(self, args: argparse.Namespace) -> float:
        """Counts the encoder's operations behind one of an image's rows."""
        return encoder_flops(args, 1) / self.rows_per_image if self._name == VISION else 0.0


def images_per_sample(batch: Mapping[str, torch.Tensor], *, image_token: int) -> list[int]:
    """Counts the images of every sample of a batch by its image tokens.

    Raises:
        HostError: The batch has no token ids under a known key, or another number of images.
    """
    counts = (token_ids(batch) == image_token).sum(dim=1).tolist()
    images = next((batch[key] for key in ("image", "images") if key in batch), None)
    if images is not None and images.shape[0] != sum(counts):
        raise HostError(
            f"data: images={images.shape[0]} must equal the image tokens={sum(counts)} of the "
            f"batch; give every image one token {image_token}"
        )
    return counts
