"""Pretrains a small vision-language model that names handwritten digits.

An ordinary Megatron script in the form of ``pretrain_vlm.py``: it knows nothing of plans.
"""

import argparse
from collections.abc import Iterator
from copy import deepcopy
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from data import NAMES, VOCAB_SIZE, CandidateNames, NamedDigits, load_split
from megatron.core import parallel_state, tensor_parallel
from megatron.core.enums import ModelType
from megatron.core.models.multimodal.llava_model import DEFAULT_IMAGE_TOKEN_INDEX, LLaVAModel
from megatron.core.models.multimodal.llava_spec import (
    decoder_model_with_local_default_spec,
    decoder_model_with_transformer_engine_default_spec,
)
from megatron.core.models.vision.clip_vit_model import get_num_image_embeddings
from megatron.core.models.vision.vit_layer_specs import (
    get_vit_layer_with_local_spec,
    get_vit_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.spec_utils import ModuleSpec, get_submodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.training import get_args, get_timers, pretrain, print_rank_0
from megatron.training.argument_utils import pretrain_cfg_container_from_args
from megatron.training.arguments import core_transformer_config_from_args, parse_and_validate_args

VISION_MODEL = "clip"

Batch = dict[str, torch.Tensor]
LossReport = tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]


def model_provider(
    pre_process: bool = True,
    post_process: bool = True,
    config: TransformerConfig | None = None,
    **unused: Any,
) -> LLaVAModel:
    """Builds upstream's LLaVA: a vision transformer, a projector and a GPT decoder.

    Args:
        pre_process: Whether this pipeline stage is the first; it holds the vision transformer.
        post_process: Whether this pipeline stage is the last; it computes the loss.
        config: The decoder's; from the command line if absent.
        unused: What Megatron hands to models of other kinds.
    """
    args = get_args()
    _set_sequence_lengths(args)
    print_rank_0("building a vision-language model for digits ...")
    language = config or core_transformer_config_from_args(args)
    language.num_layers = args.decoder_num_layers
    language_spec, vision_spec = _layer_specs(args)
    model = LLaVAModel(
        language_transformer_config=language,
        language_transformer_layer_spec=language_spec,
        language_vocab_size=args.padded_vocab_size,
        language_max_sequence_length=args.decoder_seq_length,
        vision_transformer_config=_vision_config(language, num_layers=args.encoder_num_layers),
        vision_transformer_layer_spec=vision_spec,
        drop_vision_class_token=args.disable_vision_class_token,
        vision_projection_config=_vision_config(language, num_layers=1),
        vision_projection_layer_spec=deepcopy(get_submodules(language_spec.submodules.mlp)),
        vision_projection_type="mlp",
        language_position_embedding_type=args.position_embedding_type,
        language_rotary_percent=args.rotary_percent,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        add_encoder=parallel_state.is_pipeline_first_stage(),
        add_decoder=True,
        img_h=args.img_h,
        img_w=args.img_w,
        patch_dim=args.patch_dim,
    )
    model.freeze(
        freeze_language_model=args.freeze_LM,
        freeze_vision_model=args.freeze_ViT,
        freeze_vision_projection=False,
    )
    return model


def _set_sequence_lengths(args: argparse.Namespace) -> None:
    """Sets the lengths that Megatron reads: the vision model's, and the language model's.

    The command line's ``--seq-length`` is the length of the text.
    """
    if args.dataloader_seq_length is None:
        args.dataloader_seq_length = args.seq_length
    num_image_embeddings = get_num_image_embeddings(
        args.img_h,
        args.img_w,
        args.patch_dim,
        VISION_MODEL,
        args.disable_vision_class_token,
        class_token_len=1,
        pixel_shuffle=False,
    )
    args.seq_length = args.encoder_seq_length = num_image_embeddings
    # The image's embeddings take the place of its one token.
    args.decoder_seq_length = args.dataloader_seq_length - 1 + num_image_embeddings
    args.max_position_embeddings = max(args.max_position_embeddings, args.decoder_seq_length)


def _layer_specs(args: argparse.Namespace) -> tuple[ModuleSpec, ModuleSpec]:
    """Layers of language and vision model, from TransformerEngine where it is installed."""
    if args.transformer_impl == "local" or find_spec("transformer_engine") is None:
        return decoder_model_with_local_default_spec(), get_vit_layer_with_local_spec()
    return (
        decoder_model_with_transformer_engine_default_spec(),
        get_vit_layer_with_transformer_engine_spec(),
    )


def _vision_config(language: TransformerConfig, *, num_layers: int) -> TransformerConfig:
    """The language model's config for a part of the vision side, which is never pipelined."""
    config = deepcopy(language)
    config.num_layers = num_layers
    config.vision_model_type = VISION_MODEL
    config.pipeline_model_parallel_size = 1
    config.context_parallel_size = 1
    config.sequence_parallel = False
    config.first_pipeline_num_layers = None
    config.last_pipeline_num_layers = None
    return config


def train_valid_test_datasets_provider(
    num_samples: list[int],
) -> tuple[NamedDigits, CandidateNames, None]:
    """Builds the data sets; the held-out digits are for validation, and there is no test set.

    Args:
        num_samples: Samples of training, validation and test.
    """
    args = get_args()
    training, held_out = load_split()
    text = {"text_length": args.dataloader_seq_length, "image_token": DEFAULT_IMAGE_TOKEN_INDEX}
    return (
        NamedDigits(training, num_samples=num_samples[0], seed=args.seed, **text),
        CandidateNames(held_out, num_samples=num_samples[1], **text),
        None,
    )


def get_batch(data_iterator: Iterator[Batch] | None) -> Batch:
    """Reads a microbatch and hands it to all tensor-parallel ranks.

    Args:
        data_iterator: The data; None on ranks that are sent it.
    """
    read = None if data_iterator is None else next(data_iterator)
    integers = tensor_parallel.broadcast_data(
        ["tokens", "labels", "position_ids", "is_name"], read, torch.int64
    )
    floats = tensor_parallel.broadcast_data(["image", "loss_mask"], read, torch.float32)
    return {**integers, **floats}


def training_loss(loss_mask: torch.Tensor, output: torch.Tensor) -> LossReport:
    """Sums the losses of all tokens that count.

    Args:
        loss_mask: 1 where a token counts ``[b, s]``.
        output: Loss of every token ``[b, s]``.

    Returns:
        The sum, the number of tokens, and both as the report.
    """
    loss = (output.float() * loss_mask).sum()
    num_tokens = loss_mask.sum().to(torch.int)
    return loss, num_tokens, {"lm loss": _pair(loss, num_tokens)}


def held_out_loss(
    loss_mask: torch.Tensor, is_name: torch.Tensor, output: torch.Tensor
) -> LossReport:
    """Counts the images whose right name is the most probable of the ten.

    Args:
        loss_mask: 1 where a token counts ``[b, s]``.
        is_name: 1 for an image's right name ``[b]``; ten consecutive samples are one image with
            all names.
        output: Loss of every token ``[b, s]``.

    Returns:
        The sum of losses of the right names, the number of their tokens, and both as the report
        together with the number of right answers and of images.

    Raises:
        ValueError: The microbatch ends in the middle of an image's ten samples.
    """
    if len(is_name) % len(NAMES) != 0:
        raise ValueError(
            f"digits: micro_batch_size={len(is_name)} must be a multiple of {len(NAMES)}, the "
            f"names that are tried for each held-out image; change --micro-batch-size"
        )
    sample_losses = (output.float() * loss_mask).sum(dim=1)
    answers = sample_losses.view(-1, len(NAMES)).argmin(dim=1)
    right_names = is_name.view(-1, len(NAMES)).argmax(dim=1)
    num_right = (answers == right_names).sum()
    loss = (sample_losses * is_name).sum()
    num_tokens = (loss_mask.sum(dim=1) * is_name).sum().to(torch.int)
    num_images = torch.full_like(num_right, len(answers))
    report = {"lm loss": _pair(loss, num_tokens), "accuracy": _pair(num_right, num_images)}
    return loss, num_tokens, report


def _pair(total: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """What Megatron sums over microbatches and replicas before it divides."""
    return torch.stack([total.detach().float(), count.detach().float()])


def forward_step(
    data_iterator: Iterator[Batch] | None, model: LLaVAModel
) -> tuple[torch.Tensor, partial[LossReport]]:
    """Runs a microbatch.

    Args:
        data_iterator: The data; None on ranks that are sent it.
        model: The model, wrapped by Megatron.

    Returns:
        The output of this pipeline stage, and the function that makes the loss of the last one's.
    """
    timers = get_timers()
    timers("batch-generator", log_level=2).start()
    batch = get_batch(data_iterator)
    timers("batch-generator").stop()
    output, loss_mask = model(
        batch["image"],
        batch["tokens"],
        batch["position_ids"],
        None,  # the layer specs say which attention is causal
        batch["labels"],
        batch["loss_mask"],
    )
    if model.training:
        return output, partial(training_loss, loss_mask)
    return output, partial(held_out_loss, loss_mask, batch["is_name"])


def add_digits_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Adds the options of a vision-language model that Megatron's parser lacks."""
    group = parser.add_argument_group(title="digits")
    group.add_argument("--freeze-LM", action="store_true", help="freeze the language model")
    group.add_argument("--freeze-ViT", action="store_true", help="freeze the vision transformer")
    group.add_argument(
        "--disable-vision-class-token", action="store_true", help="drop the class token's embedding"
    )
    group.add_argument(
        "--dataloader-seq-length", type=int, help="tokens of a text; --seq-length if absent"
    )
    return parser


if __name__ == "__main__":
    train_valid_test_datasets_provider.is_distributed = True
    parsed = parse_and_validate_args(
        extra_args_provider=add_digits_arguments,
        # Texts come as token ids: all that Megatron needs to know is how many there are.
        args_defaults={"tokenizer_type": "NullTokenizer", "vocab_size": VOCAB_SIZE},
    )
    pretrain(
        pretrain_cfg_container_from_args(parsed),
        train_valid_test_datasets_provider,
        ModelType.encoder_or_decoder,
        forward_step,
        model_provider,
    )
