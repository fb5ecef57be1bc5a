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

from megatron_mosaic.comm.boundary import ONE_ROW, ItemShape
from megatron_mosaic.errors import HostError, PlanError
from megatron_mosaic.host.data.batches import batch_fields, is_absent, take_items, take_samples
from megatron_mosaic.host.data.facts import SampleFacts
from megatron_mosaic.host.families.family import Batch, check_edges, facts_of, token_ids
from megatron_mosaic.host.families.llava_masks import check_masks, stops_of_batch
from megatron_mosaic.host.families.llava_sequence import (
    SequenceMerge,
    building_on_parts,
    parts_of,
    spec_for,
)
from megatron_mosaic.host.families.llava_vision import (
    become_stage,
    check_splittable,
    item_of,
    split_images,
    tokens_of,
    with_gathered_attention,
)
from megatron_mosaic.host.groups import ModuleGroups
from megatron_mosaic.host.recompute import set_recompute
from megatron_mosaic.host.reports import encoder_flops, item_cost
from megatron_mosaic.host.sequence_parts import (
    MaskedParts,
)
from megatron_mosaic.layout.item_costs import ItemCost
from megatron_mosaic.layout.model_facts import check_module
from megatron_mosaic.layout.ownership import Runs
from megatron_mosaic.layout.placement import LANGUAGE, ModulePlacement
from megatron_mosaic.layout.plan import Plan
from megatron_mosaic.layout.rows import Interval

VISION = "vision"

# Names under which scripts keep the images of a batch, and what has one row for each of them.
IMAGE_KEYS = ("image", "images", "imgs")
PER_IMAGE_KEYS = (*IMAGE_KEYS, "num_tiles")

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
        with _building(self, bound.arguments, groups):
            original(*bound.args, **bound.kwargs)

    LLaVAModel.__init__ = build_half
    try:
        yield
    finally:
        LLaVAModel.__init__ = original


@contextmanager
def _building(model: LLaVAModel, arguments: dict[str, Any], groups: ModuleGroups) -> Iterator[None]:
    """Sets LLaVAModel's arguments to those of a half, and completes the half once it is built."""
    arguments["pg_collection"] = groups.collection
    config = arguments[f"{groups.placement.name}_transformer_config"]
    check_module(groups.placement, facts_of(retarget(config, groups.placement)))
    build = _building_language if groups.placement.name == LANGUAGE else _building_vision
    with build(model, arguments, groups):
        yield


@contextmanager
def _building_language(
    model: LLaVAModel, arguments: dict[str, Any], groups: ModuleGroups
) -> Iterator[None]:
    config = retarget(arguments["language_transformer_config"], groups.placement)
    arguments |= {
        "language_transformer_config": config,
        "add_encoder": False,
        "add_decoder": True,
        "pre_process": groups.is_first_stage,
        "post_process": groups.is_last_stage,
    }
    parts = parts_of(arguments, groups)
    if parts is None:
        yield
        return
    spec = spec_for(parts, arguments["language_transformer_layer_spec"], config, groups)
    whole = copy.copy(config)
    whole.sequence_parallel, whole.context_parallel_size = False, 1
    arguments["language_transformer_config"] = whole
    with building_on_parts(config, spec):
        yield
    model.sequence_merge = SequenceMerge(model, config=config, parts=parts, groups=groups)


@contextmanager
def _building_vision(
    model: LLaVAModel, arguments: dict[str, Any], groups: ModuleGroups
) -> Iterator[None]:
    placement = groups.placement
    vision = retarget(arguments["vision_transformer_config"], placement)
    tokens = tokens_of(arguments, groups)
    projection = retarget(arguments["vision_projection_config"], placement)
    # Its layers work on the tokens that they get: only their attention knows of other ranks.
    vision.context_parallel_size = projection.context_parallel_size = 1
    projection.pipeline_model_parallel_size = 1
    arguments |= {
        # The half's own config: DDP and the gradient rules read it from the model.
        "language_transformer_config": vision,
        "vision_transformer_config": vision,
        "vision_projection_config": projection,
        "add_encoder": True,
        "add_decoder": False,
        "pre_process": True,
        "post_process": True,
    }
    split = tokens.cp > 1 or placement.num_stages > 1
    if split:
        check_splittable(arguments, groups)
    if tokens.cp > 1:
        spec = arguments["vision_transformer_layer_spec"]
        arguments["vision_transformer_layer_spec"] = with_gathered_attention(
            spec, tokens.split(groups)
        )
    yield
    if split:
        become_stage(model, groups)
    if tokens.cp > 1:
        split_images(model, tokens, groups)
    model.image_item = item_of(model, tokens)


def retarget(config: TransformerConfig, placement: ModulePlacement) -> TransformerConfig:
    """Copies a config with the parallel sizes of a module."""
    config = copy.copy(config)
    # A stage is one of a pipeline, also where a rank has several (see StageGroup).
    stages = placement.num_stages
    config.tensor_model_parallel_size = placement.tensor_model_parallel_size
    config.context_parallel_size = placement.context_parallel_size
    config.pipeline_model_parallel_size = stages
    config.sequence_parallel = placement.sequence_parallel
    config.expert_model_parallel_size = placement.expert_model_parallel_size
    config.expert_tensor_parallel_size = placement.expert_shape.expt_tp
    # A transfer has its own hold on the values that leave a stage (see runner.py).
    config.deallocate_pipeline_outputs = True
    config.pipeline_model_parallel_layout = None
    if placement.layers_per_stage is not None:
        rows = [["decoder"] * layers for layers in placement.layers_per_stage]
        rows[0].insert(0, "embedding")
        rows[-1].append("loss")
        config.pipeline_model_parallel_layout = PipelineParallelLayerLayout(rows, stages)
    set_recompute(config, placement)
    if placement.name != LANGUAGE:
        # An encoder's gradient is a plain sum over its replicas; the engine scales it.
        config.calculate_per_token_loss = True
        # Scripts copy the language model's config. An encoder is dense, and its forward steps
        # must not set the scale of the language model's auxiliary losses.
        config.num_moe_experts = None
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
        # Only the last stage of the half with the encoder has a projection, and makes rows.
        maker = inner.vision_projection if hasattr(inner.vision_projection, "config") else inner
        self.width: int = maker.config.hidden_size
        self.makes_loss = name == LANGUAGE
        self.item: ItemShape = getattr(inner, "image_item", ONE_ROW)
        self._merge: SequenceMerge | None = getattr(inner, "sequence_merge", None)
        self.keeps_parts = self._merge is not None
        self._name = name
        self._vision_config = getattr(inner.vision_model, "config", None)

    def rows_of(self, output: torch.Tensor) -> torch.Tensor:
        """Flattens image embeddings ``[rows, images, h]`` into ``[images * rows, h]``."""
        return output.transpose(0, 1).flatten(0, 1)

    def begin(self, samples: Sequence[SampleFacts]) -> None:
        """Takes the samples of the next forward task."""
        if self._merge is not None:
            self._merge.take(tuple(each.sequence for each in samples))

    def rows_beside_loss(self) -> None:
        """Returns None: nothing is fed by the language model."""
        return None

    def hidden_of(self, output: torch.Tensor) -> torch.Tensor:
        """Leaves a hidden state as it is."""
        return output

    def inputs_of(self, received: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Inverse of :meth:`rows_of`; no image gives LLaVA's empty ``[0, 0, h]``.

        Where ranks keep parts of sequences the rows stay as they are, to be merged one by one.
        """
        if self._name in received:
            return received[self._name]
        (embeddings,) = received.values()
        if self._merge is not None:
            return embeddings
        if embeddings.shape[0] == 0:
            return embeddings.reshape(0, 0, embeddings.shape[-1])
        images = embeddings.reshape(-1, self.rows_per_image, embeddings.shape[-1])
        return images.transpose(0, 1).contiguous()

    def row_runs(self, batch: Batch) -> Mapping[str, Sequence[Runs]]:
        """Finds where the image rows of every sample belong, from its image tokens.

        The rows of an image take the place of its one token, and move what follows.
        """
        rows = self.rows_per_image
        return {
            VISION: [
                tuple(
                    Interval(start, start + rows)
                    for start in (token + n * (rows - 1) for n, token in enumerate(tokens))
                )
                for tokens in image_tokens(batch, image_token=self.image_token)
            ]
        }

    def document_stops(self, batch: Batch) -> Sequence[tuple[int, ...]] | None:
        """Finds where the documents of every sample end, and checks that its mask can be."""
        parts = None if self._merge is None else self._merge.parts
        if not isinstance(parts, MaskedParts):
            return None
        stops = stops_of_batch(
            batch,
            attention=parts.attention,
            image_token=self.image_token,
            rows_per_image=self.rows_per_image,
            sequence_length=parts.length,
        )
        check_masks(
            list(zip(self.row_runs(batch)[VISION], stops, strict=True)),
            attention=parts.attention,
            sequence_length=parts.length,
        )
        return stops

    def take_samples(self, batch: Batch, samples: Interval) -> Batch:
        """Cuts samples and their images out of a batch that a loader collated."""
        images = [len(each) for each in image_tokens(batch, image_token=self.image_token)]
        return take_samples(batch, samples, images=images, per_image=PER_IMAGE_KEYS)

    def take_items(self, batch: Batch, items: Sequence[Sequence[int]]) -> Batch:
        """Cuts images out of a batch, and the samples that have any of them.

        A batch may also have these images alone, though its text has the tokens of all.
        """
        images = (token_ids(batch) == self.image_token).sum(dim=1).tolist()
        number, wanted = count_images(batch), sum(map(len, items))
        if number == wanted < sum(images):
            return batch
        _check_images(number, sum(images), image_token=self.image_token)
        return take_items(batch, items, images=images, per_image=PER_IMAGE_KEYS)

    def item_cost(self) -> ItemCost:
        """Tells the cost of an image; all have the same size."""
        configs = [] if self._vision_config is None else [self._vision_config]
        return item_cost(configs, item_rows=self.rows_per_image)

    def flops_per_row(self, args: argparse.Namespace, *, trained: Mapping[str, float]) -> float:
        """Counts the encoder's operations behind one of an image's rows."""
        if self._name != VISION:
            return 0.0
        return encoder_flops(args, 1, trained=trained) / self.rows_per_image


def image_tokens(batch: Batch, *, image_token: int) -> list[list[int]]:
    """Finds the places of the image tokens in the text of every sample of a batch.

    Raises:
        HostError: The batch has no token ids under a known key, or another number of images.
    """
    places = [row.nonzero().flatten().tolist() for row in token_ids(batch) == image_token]
    _check_images(count_images(batch), sum(map(len, places)), image_token=image_token)
    return places


def count_images(batch: Batch) -> int | None:
    """Counts the images of a batch; None if it holds none under a known name."""
    fields = batch_fields(batch)
    images = next((fields[key] for key in IMAGE_KEYS if key in fields), None)
    return None if images is None or is_absent(images) else images.shape[0]


def _check_images(images: int | None, count: int, *, image_token: int) -> None:
    if images is not None and images != count:
        raise HostError(
            f"data: images={images} must equal the image tokens={count} of the "
            f"batch; give every image one token {image_token}"
        )
