"""Rotary positions of the tokens in a rank's slots, whose places say nothing of them."""

from typing import Any

import numpy as np
import torch

from megatron_mosaic.errors import PlanError
from megatron_mosaic.host.multimodal_attention import MaskedSequences
from megatron_mosaic.layout.sequences import SampleSequence
from megatron_mosaic.tokens.mask import NO_DOCUMENT, SequenceMask
from megatron_mosaic.tokens.ranges import Integers

Grid = tuple[int, int]
"""Rows and columns of the patches of an image."""


def document_positions(mask: SequenceMask) -> Integers:
    """Position of every token from the beginning of its document; 0 of padding.

    Megatron counts so in packed (``thd``) sequences.
    """
    begins = np.diff(mask.document, prepend=NO_DOCUMENT - 1) != 0
    first = mask.starts[np.flatnonzero(begins)][np.cumsum(begins) - 1]
    sizes = np.diff(mask.stops, prepend=0)
    positions = np.arange(mask.length) - np.repeat(first, sizes)
    return np.where(np.repeat(mask.document != NO_DOCUMENT, sizes), positions, 0)


def grid_positions(mask: SequenceMask, sample: SampleSequence, *, grid: Grid) -> Integers:
    """Position of every token along time, height and width ``[3, tokens]``.

    The three are equal for text. A patch adds its row and its column to the position at which its
    image begins, and the text behind it goes on from the larger of both.

    Args:
        mask: Mask of the sample.
        sample: Where its images lie.
        grid: Patches of an image.

    Source: Qwen2-VL, arXiv 2409.12191, section 2.1 (M-RoPE).
    """
    height, width = grid
    stops = np.array([mask.length] if sample.document_stops is None else sample.document_stops)
    later = np.zeros(mask.length + 1, dtype=np.int64)
    images = []
    for start, stop in sample.items:
        document = np.searchsorted(stops, start, side="right")
        if document < len(stops):
            stop = min(stop, int(stops[document]))
            images.append((start, stop))
            # Tokens behind an image count its longer side, not its patches.
            later[stop] += stop - start - max(height, width)
            later[stops[document]] -= stop - start - max(height, width)
    positions = np.tile(document_positions(mask) - np.cumsum(later)[:-1], (3, 1))
    row, column = np.divmod(np.arange(height * width), width)
    for start, stop in images:
        first, patches = positions[0, start], stop - start
        positions[0, start:stop] = first
        positions[1, start:stop] = first + row[:patches]
        positions[2, start:stop] = first + column[:patches]
    return positions


class RotaryOfSlots(torch.nn.Module):
    """Gives every slot of a rank the rotary embedding of the token that lies in it.

    Upstream's embeddings are those of consecutive positions, the same in all samples. It asks
    them for a length first, of which only they know what it means: here that is the microbatch.

    Args:
        rotary: Upstream's embedding.
    """

    def __init__(self, rotary: Any) -> None:
        super().__init__()
        self.rotary = rotary

    def get_rotary_seq_len(
        self,
        inference_context: Any,
        transformer: Any,
        transformer_input: Any,
        transformer_config: Any,
        packed_seq_params: Any = None,
    ) -> Any:
        """Returns what :meth:`forward` takes."""
        return packed_seq_params

    def forward(self, sequences: MaskedSequences, **unused: Any) -> Any:
        """Returns the embedding ``[s, b, 1, d]``; with what upstream's returns beside it."""
        embedding = self.rotary.get_emb(sequences.num_positions)
        table, *scale = embedding if isinstance(embedding, tuple) else (embedding,)
        own = table[:, 0, 0][sequences.rotary_positions[0].T][:, :, None]
        return (own, *scale) if scale else own


def embed_slots(language: Any) -> None:
    """Makes a language model embed the positions of its slots, if it embeds any in attention.

    Args:
        language: GPTModel; LLaVAModel gives it no positions.
    """
    if language.position_embedding_type == "mrope":
        # Positions are those of this rank's slots: it has nothing to cut out of them.
        language.rotary_pos_emb.cp_group = None
        language.register_forward_pre_hook(_with_positions, with_kwargs=True)
    elif hasattr(language, "rotary_pos_emb"):
        language.rotary_pos_emb = RotaryOfSlots(language.rotary_pos_emb)


def image_grid(arguments: Any) -> Grid:
    """Finds the patches of an image from LLaVAModel's arguments, for M-RoPE.

    Raises:
        PlanError: An image becomes more rows than its patches.
    """
    side = arguments["patch_dim"] * (2 if arguments["pixel_shuffle"] else 1)
    if not arguments["drop_vision_class_token"] or arguments["tile_tags"] is not None:
        raise PlanError(
            "modules.language: position_embedding_type=mrope must be rope with attention where "
            "rows of an image are no patches; drop class tokens and tile tags, or use rope"
        )
    return arguments["img_h"] // side, arguments["img_w"] // side


def _with_positions(
    language: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    positions = kwargs["packed_seq_params"].rotary_positions
    return args, kwargs | {"position_ids": positions}
