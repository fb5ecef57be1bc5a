"""Masks of long multimodal sequences, drawn from the families that the benchmarks balance.

    EP      vision (30-60 % of the tokens), audio (5-15 %), text: encoder outputs prepended
    EE      text spans and images in turn, every image a group of its own: encoder outputs embedded
    EEg     the same, all images one group
    MP      packed documents, each as EE
    causal  one document of text

What the source does not say of them is a :class:`Sizes`: how far text and documents scatter, and
how image sizes lie between their limits.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np

from megatron_mosaic.tokens.mask import Segment, SequenceMask, modality_tokens, text

Family = Literal["EP", "EE", "EEg", "MP", "causal"]

_TEXT_MEDIAN, _TEXT_LIMITS = 245, (16, 4096)
_IMAGE_LIMITS = (256, 4096)
_DOCUMENT_MEDIAN, _DOCUMENT_LEAST = 2400, 256
_VISION, _AUDIO = (0.30, 0.60), (0.05, 0.15)


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How sizes scatter.

    Args:
        text_sigma: Standard deviation of the logarithm of a text span's length.
        document_sigma: That of a document's length.
        images: Whether image sizes are uniform between their limits, or their logarithms are.
    """

    text_sigma: float
    document_sigma: float
    images: Literal["uniform", "log_uniform"]


def draw_mask(family: Family, *, length: int, seed: int, sizes: Sizes) -> SequenceMask:
    """Draws the mask of one sequence.

    Args:
        family: See the module.
        length: Tokens.
        seed: Seed of the generator; the family is part of it.
        sizes: What the family leaves open.
    """
    generator = np.random.default_rng([seed, list(FAMILIES).index(family)])
    return SequenceMask.of(FAMILIES[family](generator, length, sizes))


def _prepended(generator: np.random.Generator, length: int, sizes: Sizes) -> Iterator[Segment]:
    vision = int(length * generator.uniform(*_VISION))
    audio = int(length * generator.uniform(*_AUDIO))
    yield modality_tokens(vision, group=0)
    yield modality_tokens(audio, group=1, modality=1)
    yield text(length - vision - audio)


def _embedded(
    generator: np.random.Generator,
    length: int,
    sizes: Sizes,
    *,
    document: int = 0,
    one_group: bool = False,
) -> Iterator[Segment]:
    left, number = length, 0
    while left:
        span = _log_normal(generator, _TEXT_MEDIAN, sizes.text_sigma, _TEXT_LIMITS)
        yield text(min(span, left), document=document)
        left -= min(span, left)
        image = min(_image(generator, sizes), left)
        yield modality_tokens(image, group=0 if one_group else number, document=document)
        left, number = left - image, number + 1


def _one_group(generator: np.random.Generator, length: int, sizes: Sizes) -> Iterator[Segment]:
    return _embedded(generator, length, sizes, one_group=True)


def _packed(generator: np.random.Generator, length: int, sizes: Sizes) -> Iterator[Segment]:
    limits = (_DOCUMENT_LEAST, length // 2)
    left, document = length, 0
    while left:
        size = _log_normal(generator, _DOCUMENT_MEDIAN, sizes.document_sigma, limits)
        yield from _embedded(generator, min(size, left), sizes, document=document)
        left, document = left - min(size, left), document + 1


def _causal(generator: np.random.Generator, length: int, sizes: Sizes) -> Iterator[Segment]:
    yield text(length)


FAMILIES: Final[dict[Family, Callable[[np.random.Generator, int, Sizes], Iterator[Segment]]]] = {
    "EP": _prepended,
    "EE": _embedded,
    "EEg": _one_group,
    "MP": _packed,
    "causal": _causal,
}


def _log_normal(
    generator: np.random.Generator, median: int, sigma: float, limits: tuple[int, int]
) -> int:
    return int(np.clip(generator.lognormal(np.log(median), sigma), *limits))


def _image(generator: np.random.Generator, sizes: Sizes) -> int:
    if sizes.images == "uniform":
        return int(generator.integers(_IMAGE_LIMITS[0], _IMAGE_LIMITS[1], endpoint=True))
    return int(np.exp(generator.uniform(*np.log(_IMAGE_LIMITS))))
