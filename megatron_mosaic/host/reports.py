"""Floating-point operations of a step, the encoders' included."""

import argparse
import copy
from collections.abc import Iterable, Mapping
from typing import Any

from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.training.training import num_floating_point_operations as stock_operations

from megatron_mosaic.layout.item_costs import ItemCost
from megatron_mosaic.layout.placement import LANGUAGE


class StepFlops:
    """Stands for Megatron's count of a global batch's operations.

    The stock function counts the language model alone, and with LLaVA scripts at the vision
    sequence length, which they write into ``args.seq_length``.
    """

    def __init__(self) -> None:
        # Operations behind the boundary rows of the last step, by the module that made them.
        self.of_rows: Mapping[str, float] = {}
        # Part of the language model's weights that trains, by part; all until it is known.
        self.trained: Mapping[str, float] = {}
        # Tokens of a sample in the language model: scripts settle them where they build a module,
        # so that an idle rank's arguments do not say.
        self.sequence_length: int | None = None

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        """Pickles as None: patched forks find it in the arguments, which go into checkpoints."""
        return type(None), ()

    def __call__(self, args: argparse.Namespace, batch_size: int, **unused: Any) -> float:
        """Counts forward and backward operations of one global batch.

        Args:
            args: Megatron's arguments.
            batch_size: Samples.
            unused: Statistics of packed sequences, which these scripts do not have.
        """
        return sum(self.by_module(args, batch_size).values())

    def by_module(self, args: argparse.Namespace, batch_size: int) -> dict[str, float]:
        """Counts the same of every module."""
        own = language_flops(
            args, batch_size, trained=self.trained, sequence_length=self.sequence_length
        )
        return {**self.of_rows, LANGUAGE: own + self.of_rows.get(LANGUAGE, 0.0)}


def language_flops(
    args: argparse.Namespace,
    batch_size: int,
    *,
    trained: Mapping[str, float],
    sequence_length: int | None = None,
) -> float:
    """Counts the language model's operations, at the length of text and image together.

    Of the stock count a third each is for the forward pass, the gradient of the input, and that of
    the weights; frozen weights have none.
    """
    language = copy.copy(args)
    # A patched fork would ask the counter that calls this one.
    language.num_floating_point_operations_func = None
    language.seq_length = sequence_length or args.decoder_seq_length or args.seq_length
    language.num_layers = args.decoder_num_layers or args.num_layers
    return stock_operations(language, batch_size) * (2 + trained.get("decoder", 1.0)) / 3


def encoder_flops(
    args: argparse.Namespace, num_images: int, *, trained: Mapping[str, float]
) -> float:
    """Counts the operations of the vision transformer and its projector.

    A layer does, for each of the s tokens of an image, 2 h (h + 2 k) for queries, keys and values
    of width k = groups * head size, 2 h^2 for the output, 4 s h for scores and weighted values of
    full attention, and 2 h f for each linear layer of its MLP, which has a third one if gated.
    A backward pass does as much for the gradient of the input, and for that of the weights by
    the part of them that trains. Where nothing trains at or before a part, it has none.
    """
    tokens = args.seq_length + int(args.disable_vision_class_token)
    hidden, ffn = args.hidden_size, args.ffn_hidden_size
    groups = args.num_query_groups if args.group_query_attention else args.num_attention_heads
    key_width = groups * args.kv_channels
    attention = 2 * hidden * (hidden + 2 * key_width) + 2 * hidden**2 + 4 * tokens * hidden
    mlp = (3 if args.swiglu else 2) * 2 * hidden * ffn
    patches = 2 * hidden * 3 * args.patch_dim**2
    transformer = tokens * (args.encoder_num_layers * (attention + mlp) + patches)
    projector = args.seq_length * mlp
    encoder, projecting = trained.get("encoder", 1.0), trained.get("projector", 1.0)
    transformer_passes = 2 + encoder if encoder else 1
    projector_passes = 2 + projecting if encoder or projecting else 1
    return num_images * (transformer_passes * transformer + projector_passes * projector)


def flops_per_token(config: TransformerConfig) -> float:
    """Counts the operations of one forward pass of a transformer's linear layers for a token.

    The terms are those of :func:`encoder_flops`, without the scores of attention.
    """
    hidden, ffn = config.hidden_size, config.ffn_hidden_size or 4 * config.hidden_size
    key_width = (config.num_query_groups or config.num_attention_heads) * config.kv_channels
    attention = 2 * hidden * (hidden + 2 * key_width) + 2 * hidden**2
    mlp = (3 if config.gated_linear_unit else 2) * 2 * hidden * ffn
    return float(config.num_layers * (attention + mlp))


def item_cost(configs: Iterable[TransformerConfig], *, item_rows: int | None = None) -> ItemCost:
    """Counts what a row of an item costs in the transformers that run it, and a pair of rows.

    Scores and weighted values of full attention are the 4 s h of :func:`encoder_flops`, for all
    heads of a layer together.

    Args:
        configs: Those of the transformers.
        item_rows: Rows of every item; None where they differ.
    """
    configs = list(configs)
    widths = [each.num_layers * each.num_attention_heads * each.kv_channels for each in configs]
    return ItemCost(
        item_rows=item_rows,
        row_flops=sum(map(flops_per_token, configs)),
        pair_flops=4.0 * sum(widths),
    )
