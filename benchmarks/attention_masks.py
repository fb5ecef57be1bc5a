"""Masks of which the rate of attention is measured, one for each preset."""

from typing import Final

from benchmarks.drawn_masks import Family, Sizes, draw_mask
from megatron_mosaic.tokens.mask import SequenceMask
from megatron_mosaic.tokens.presets import Item, Preset, preset_mask

PRESETS: tuple[Preset, ...] = (
    "causal",
    "prefix_lm",
    "encoder_prepended",
    "encoder_embedded",
    "multimodal_packed",
)
PREFIX_SHARE = 0.4
"""Of a prefix language model's sequence: within the 30-60 % that vision has in prepended ones."""

_SIZES = Sizes(text_sigma=1.0, document_sigma=1.0, images="uniform")
_FAMILIES: Final[dict[str, Family]] = {
    "encoder_prepended": "EP",
    "encoder_embedded": "EE",
    "multimodal_packed": "MP",
}


def bench_mask(preset: str, *, length: int, seed: int) -> SequenceMask:
    """The mask of a preset, with items and documents drawn from a seed."""
    if preset in _FAMILIES:
        return draw_mask(_FAMILIES[preset], length=length, seed=seed, sizes=_SIZES)
    if preset == "prefix_lm":
        return preset_mask(preset, length=length, items=[Item(0, int(length * PREFIX_SHARE))])
    return preset_mask("causal", length=length)
