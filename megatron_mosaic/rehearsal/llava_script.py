"""A training script in the form of ``pretrain_vlm.py``, around a thin LLaVAModel."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.multimodal.llava_model import DEFAULT_IMAGE_TOKEN_INDEX, LLaVAModel
from megatron.core.models.multimodal.llava_spec import decoder_model_with_local_default_spec
from megatron.core.models.vision.vit_layer_specs import get_vit_layer_with_local_spec
from megatron.core.transformer.spec_utils import get_submodules
from megatron.training import get_args
from megatron.training.arguments import core_transformer_config_from_args

from megatron_mosaic.host.families.llava import PARTS
from megatron_mosaic.layout.placement import LANGUAGE
from megatron_mosaic.rehearsal.masks import PACKED, dense_masks, document_ids, image_places
from megatron_mosaic.rehearsal.script import (
    Batch,
    Samples,
    freeze,
    loss_func,
    read_batch,
    rehearsed,
    run_script,
    text_of,
)
from megatron_mosaic.rehearsal.tiny import ITEM_ROWS, MOST_ITEMS, VISION, VOCABULARY

PATCH = 14
SIDE = 2 * PATCH  # of an image of ITEM_ROWS patches


def model_provider(
    pre_process: bool = True, post_process: bool = True, **unused: Any
) -> torch.nn.Module:
    """Builds what the rank has of the model."""
    args = get_args()
    plan, tiny = rehearsed()
    args.seq_length = args.encoder_seq_length = ITEM_ROWS
    longest = tiny.text_length + MOST_ITEMS * (ITEM_ROWS - 1)
    args.decoder_seq_length = -(-longest // tiny.length_multiple) * tiny.length_multiple
    language, vision, projection = (core_transformer_config_from_args(args) for _ in range(3))
    language.num_layers, vision.num_layers = tiny.num_layers[LANGUAGE], tiny.num_layers[VISION]
    vision.vision_model_type = "clip"
    for config in (vision, projection):
        config.sequence_parallel = False
        config.pipeline_model_parallel_size = 1
    projector = decoder_model_with_local_default_spec(None, False).submodules.mlp
    model = LLaVAModel(
        language_transformer_config=language,
        language_transformer_layer_spec=decoder_model_with_local_default_spec(
            args.num_experts, False
        ),
        language_vocab_size=args.padded_vocab_size,
        language_max_sequence_length=args.decoder_seq_length,
        vision_transformer_config=vision,
        vision_transformer_layer_spec=get_vit_layer_with_local_spec(),
        drop_vision_class_token=True,
        vision_projection_config=projection,
        vision_projection_layer_spec=get_submodules(projector),
        vision_projection_type="mlp",
        parallel_output=True,
        language_position_embedding_type=args.position_embedding_type,
        language_rotary_percent=args.rotary_percent,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        add_encoder=parallel_state.is_pipeline_first_stage(),
        add_decoder=True,
        img_h=SIDE,
        img_w=SIDE,
        patch_dim=PATCH,
    )
    freeze(model, plan, {name: PARTS[name] for name in (VISION, LANGUAGE)})
    return model


def _sample(index: int, *, length: int, even: bool, mask: str | None) -> Batch:
    """Draws a sample with an image or two, or none.

    Args:
        index: Its number.
        length: Its tokens.
        mask: What says where they may stand; None is anywhere.
        even: Whether all samples have equally many: what pads them has a part in the losses of
            routers.
    """
    generator = torch.Generator().manual_seed(1000 + index)
    num_images = MOST_ITEMS if even else (1, 0, 2, 1, 0, 0, 2)[index % 7]
    sample = text_of(generator, index=index, length=length, vocabulary=VOCABULARY)
    places = torch.randperm(length - 1, generator=generator)[:num_images].tolist()
    if mask is not None:
        places = image_places(mask, index=index, num_images=num_images, length=length)
    sample["tokens"][places] = DEFAULT_IMAGE_TOKEN_INDEX
    sample["loss_mask"][places] = 0.0
    if mask == PACKED:
        sample["document_ids"] = torch.from_numpy(document_ids(index, length))
        sample["loss_mask"] *= sample["document_ids"] >= 0
    return sample | {"image": torch.randn(num_images, 3, SIDE, SIDE, generator=generator)}


def train_valid_test_datasets_provider(num_samples: list[int]) -> tuple[Samples | None, ...]:
    """Makes the data."""
    plan, tiny = rehearsed()
    attention = plan.language.attention
    sample = partial(
        _sample,
        length=tiny.text_length,
        even=tiny.num_experts is not None,
        mask=None if attention is None else attention.mask,
    )
    return tuple(
        Samples(number, sample, media=("image",)) if number else None for number in num_samples
    )


def forward_step(
    data_iterator: Iterator[Batch] | None, model: torch.nn.Module
) -> tuple[torch.Tensor, Callable[..., Any]]:
    """Runs the model on one batch."""
    data = next(data_iterator) if data_iterator is not None else None
    batch = read_batch(data, media={"image": (3, SIDE, SIDE)})
    output, loss_mask = model(
        batch["image"],
        batch["tokens"],
        batch["position_ids"],
        _mask_of(batch["tokens"], None if data is None else data.get("document_ids")),
        batch["labels"],
        batch["loss_mask"],
    )
    return output, partial(loss_func, loss_mask)


def _mask_of(tokens: torch.Tensor, ids: torch.Tensor | None) -> torch.Tensor | None:
    """The plan's mask where nothing but the script makes it: in one process, without the plan."""
    args, attention = get_args(), rehearsed()[0].language.attention
    if attention is None or getattr(args, "mosaic_plan", None) is not None:
        return None
    return dense_masks(
        tokens,
        [None] * len(tokens) if ids is None else list(ids),
        mask=attention.mask,
        rows=ITEM_ROWS,
        max_length=args.decoder_seq_length,
    )


def main(
    parse_and_validate_args: Callable[..., Any],
    pretrain: Callable[..., None],
    provider: Callable[..., torch.nn.Module] = model_provider,
) -> None:
    """Runs the script with Megatron's two entry functions, or with Mosaic's."""
    run_script(
        parse_and_validate_args,
        pretrain,
        datasets_provider=train_valid_test_datasets_provider,
        forward_step=forward_step,
        provider=provider,
    )
