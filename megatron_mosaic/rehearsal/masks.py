"""Samples for attention masks, and the dense masks that stock Megatron needs in their place."""

from collections.abc import Sequence

import numpy as np
import torch
from megatron.core.models.multimodal.llava_model import DEFAULT_IMAGE_TOKEN_INDEX

from megatron_mosaic.tokens.mask import dense
from megatron_mosaic.tokens.names import Preset
from megatron_mosaic.tokens.presets import Item, document_stops, preset_mask

PACKED = "multimodal_packed"
PREPENDED = "encoder_prepended"


def image_places(mask: str, *, index: int, num_images: int, length: int) -> list[int]:
    """Tokens of a sample that stand for images: at the start, at the end, in the middle or spread.

    Args:
        mask: Its mask, which may allow them at the start only.
        index: Number of the sample.
        num_images: Its images.
        length: Its tokens.
    """
    first = {0: 0, 1: length - num_images, 2: length // 2}.get(index % 4)
    if mask == PREPENDED:
        first = 0
    if first is None:
        return [1 + image * (length // 7) for image in range(num_images)]
    return list(range(first, first + num_images))


def document_ids(index: int, length: int) -> np.ndarray:
    """Documents of the tokens of a sample: two and padding, three, or one."""
    ends = ((length // 3, length - 5), (1, length // 2, length), (length,))[index % 3]
    ids = np.searchsorted(ends, np.arange(length), side="right")
    return np.where(ids < len(ends), ids, -1)


def dense_masks(
    tokens: torch.Tensor,
    ids: Sequence[torch.Tensor | None],
    *,
    mask: Preset,
    rows: int,
    max_length: int,
) -> torch.Tensor:
    """What every token may not see ``[b, 1, s, s]``, as Megatron's own attention wants it.

    Args:
        tokens: Of each sample ``[b, s]``, one for an image.
        ids: Documents of each sample's tokens, if it has several.
        mask: The mask.
        rows: Tokens that an image becomes.
        max_length: Of a sequence.
    """
    sizes_of = np.where(tokens.numpy() == DEFAULT_IMAGE_TOKEN_INDEX, rows, 1)
    # In one process LLaVAModel pads samples to the longest.
    length = min(sizes_of.sum(axis=1).max(), max_length)
    masks = []
    for sizes, own in zip(sizes_of, ids, strict=True):
        ends = np.cumsum(sizes)
        items = [
            Item(int(end) - rows, int(end))
            for end, size in zip(ends, sizes, strict=True)
            if size > 1
        ]
        stops = [int(ends[-1])]
        if own is not None:
            stops = [int(ends[stop - 1]) for stop in document_stops(own.numpy())]
        stops = list(dict.fromkeys(min(stop, length) for stop in stops))
        masks.append(~dense(preset_mask(mask, length=length, items=items, document_stops=stops)))
    return torch.from_numpy(np.stack(masks))[:, None]
