"""LLaVA's vision half in pipeline stages, and on ranks that each have a part of every image.

Upstream's CLIPViTModel knows neither. Its transformer does: it builds the layers of one stage, and
works on the tokens that it is given.
"""

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.models.multimodal.llava_model import LLaVAModel
from megatron.core.models.vision.clip_vit_model import CLIPViTModel
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import nn

from megatron_mosaic.comm.boundary import ItemShape
from megatron_mosaic.errors import PlanError
from megatron_mosaic.host.attention import SplitTokens, gathering, with_core_attention
from megatron_mosaic.host.groups import ModuleGroups
from megatron_mosaic.layout.rows import Interval


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageTokens:
    """Tokens of an image inside the vision transformer, and how ranks share them.

    Args:
        length: Tokens of an image, class tokens among them.
        dropped: Class tokens at the beginning that do not become rows.
        cp: Context-parallel size.
    """

    length: int
    dropped: int
    cp: int

    @property
    def local_length(self) -> int:
        """Tokens of one rank; the last ranks have padding where the length is no multiple."""
        return -(-self.length // self.cp)

    def shards(self) -> tuple[Interval, ...] | None:
        """Rows of an image that each context-parallel rank makes; None if there is one."""
        if self.cp == 1:
            return None
        rows = Interval(0, self.length - self.dropped)
        first = Interval(0, self.local_length).shift(-self.dropped)
        return tuple(first.shift(cp * self.local_length).clip(rows) for cp in range(self.cp))

    def split(self, groups: ModuleGroups) -> SplitTokens:
        """Describes for attention which rank holds which tokens."""
        step = self.local_length
        positions = tuple(tuple(range(cp * step, (cp + 1) * step)) for cp in range(self.cp))
        return SplitTokens(group=groups.collection.cp, positions=positions, length=self.length)


def tokens_of(arguments: Any, groups: ModuleGroups) -> ImageTokens:
    """Counts the tokens of an image from LLaVAModel's arguments."""
    kind = arguments["vision_transformer_config"].vision_model_type
    patches = (arguments["img_h"] // arguments["patch_dim"]) * (
        arguments["img_w"] // arguments["patch_dim"]
    )
    class_tokens = 0 if kind == "siglip" else 1
    return ImageTokens(
        length=patches + class_tokens,
        dropped=class_tokens if arguments["drop_vision_class_token"] else 0,
        cp=groups.placement.context_parallel_size,
    )


def check_splittable(arguments: Any, groups: ModuleGroups) -> None:
    """Checks that this vision model can be split over stages and ranks as the plan says.

    Raises:
        PlanError: It cannot.
    """
    placement = groups.placement
    cp, stages = placement.context_parallel_size, placement.pipeline_model_parallel_size
    shown = f"context_parallel_size={cp}"
    if cp == 1:
        shown = f"pipeline_model_parallel_size={stages}"
    if cp == stages == 1:
        virtual = placement.virtual_pipeline_model_parallel_size
        shown = f"virtual_pipeline_model_parallel_size={virtual}"
    where = f"modules.{placement.name}: {shown} must be 1"
    kind = arguments["vision_transformer_config"].vision_model_type
    if kind not in ("clip", "siglip") and not kind.startswith("internvit"):
        raise PlanError(f"{where} for vision_model_type={kind}; use data or tensor parallelism")
    if cp > 1 and (arguments["pixel_shuffle"] or arguments["tile_tags"] is not None):
        raise PlanError(
            f"{where} with pixel_shuffle or tile tags, which mix the tokens of an image; "
            f"use data or tensor parallelism"
        )


def with_gathered_attention(spec: ModuleSpec, split: SplitTokens) -> ModuleSpec:
    """Copies the spec of the vision transformer's layers for ranks with parts of an image."""
    return with_core_attention(spec, lambda attention: gathering(attention, split))


def become_stage(model: LLaVAModel, groups: ModuleGroups) -> None:
    """Removes from a vision half what other pipeline stages do."""
    vision: Any = model.vision_model
    assert isinstance(vision, CLIPViTModel)
    if not groups.is_first_stage:
        vision.decoder.pre_process = False
        for name in ("conv1", "position_embeddings", "class_token", "ln_pre"):
            setattr(vision, name, None)
        vision.forward = lambda images: _run_received(vision)
    if not groups.is_last_stage:
        model._drop_vision_class_token = False
        model._pixel_shuffle = False
        model._tile_tags = None
        model.vision_projection = nn.Identity()
        vision.ln_post = None


def _run_received(vision: Any) -> torch.Tensor:
    """Runs the layers on the hidden state of the former stage. Returns ``[b, s, h]``."""
    hidden = vision.decoder(None, None).permute(1, 0, 2).contiguous()
    return vision.ln_post(hidden) if vision.ln_post else hidden


def split_images(model: LLaVAModel, tokens: ImageTokens, groups: ModuleGroups) -> None:
    """Lets the layers of a vision half work on this rank's part of every image."""
    vision: Any = model.vision_model
    own = groups.position.cp

    def slice_tokens(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """Cuts this rank's tokens out of ``[s, b, h]``."""
        hidden, *others = inputs
        padding = tokens.local_length * tokens.cp - tokens.length
        hidden = nn.functional.pad(hidden, (0, 0, 0, 0, 0, padding))
        return hidden.chunk(tokens.cp)[own].contiguous(), *others

    def keep_rows(_: nn.Module, __: tuple[Any, ...], hidden: torch.Tensor) -> torch.Tensor:
        """Leaves the tokens that become rows behind as many class tokens as will be dropped."""
        assert shards is not None
        first = tokens.dropped - own * tokens.local_length
        rows = hidden[max(first, 0) :][: shards[own].size]
        return torch.cat([hidden.new_zeros(tokens.dropped, *hidden.shape[1:]), rows])

    shards = tokens.shards()
    if groups.is_first_stage:
        vision.decoder.register_forward_pre_hook(slice_tokens)
    if groups.is_last_stage:
        vision.decoder.register_forward_hook(keep_rows)


def item_of(model: LLaVAModel, tokens: ImageTokens) -> ItemShape:
    """Describes an image to the boundary and to the pipeline."""
    return ItemShape(
        rows=model.img_seq_len,
        shards=tokens.shards(),
        tokens=tokens.local_length,
        hidden_size=model.vision_model.config.hidden_size,
    )
