"""Floating-point operations of a step, the encoder's included."""

import argparse
import copy
from typing import Any

from megatron.training.training import num_floating_point_operations as stock_operations


def step_flops(
    args: argparse.Namespace, batch_size: int, *, images_per_sample: float = 1.0, **unused: Any
) -> float:
    """Counts the operations of one global batch of a vision-language model.

    The stock function counts the language model alone, and with LLaVA scripts at the vision
    sequence length, which they write into ``args.seq_length``.

    Args:
        args: Megatron's arguments.
        batch_size: Samples.
        images_per_sample: Images of a sample, on average.
        unused: Statistics of packed sequences, which these scripts do not have.
    """
    return language_flops(args, batch_size) + encoder_flops(args, batch_size * images_per_sample)


def language_flops(args: argparse.Namespace, batch_size: int) -> float:
    """Counts the language model's operations, at the length of text and image together."""
    language = copy.copy(args)
    language.seq_length = args.decoder_seq_length or args.seq_length
    language.num_layers = args.decoder_num_layers or args.num_layers
    return stock_operations(language, batch_size)


def encoder_flops(args: argparse.Namespace, num_images: float) -> float:
    """Counts forward and backward operations of the vision transformer and its projector.

    Per layer and token of a sequence of s tokens: 2 * 4 h^2 for the attention's four linear
    layers, 4 s h for scores and values of full attention, 2 * 2 h f for the MLP of two layers.
    Backward is twice forward; of frozen weights half of that is not done, and it is not counted.
    """
    tokens = args.seq_length + (1 if args.disable_vision_class_token else 0)
    hidden, ffn = args.hidden_size, args.ffn_hidden_size
    per_layer = 8 * hidden**2 + 4 * tokens * hidden + 4 * hidden * ffn
    patches = 2 * hidden * 3 * args.patch_dim**2
    projector = 4 * hidden * ffn
    frozen = getattr(args, "freeze_ViT", False)
    encoder = num_images * tokens * (args.encoder_num_layers * per_layer + patches)
    return encoder * (1 if frozen else 3) + num_images * args.seq_length * projector * 3
