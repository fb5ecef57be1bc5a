"""Sequences and items as training brings them: samples drawn from a model's distributions."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple, Self

import numpy as np

from megatron_mosaic.model.spec import LANGUAGE, ModelSpec, ModuleSpec, Projector
from megatron_mosaic.model.tokens import Distribution
from megatron_mosaic.tokens.mask import SequenceMask
from megatron_mosaic.tokens.names import Preset
from megatron_mosaic.tokens.presets import Item, preset_mask
from megatron_mosaic.tokens.ranges import Integers

SEED = 20250711
"""Of every sample that is drawn: the same question has the same answer."""


class ItemRows(NamedTuple):
    """What a module puts into the sequences of the language model.

    Attributes:
        number: Items of a sample.
        tokens: Tokens of an item inside its module.
        merged_tokens: Of these that become one row.
    """

    number: Distribution
    tokens: Distribution
    merged_tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """Sequences under a mask that Megatron's own attention does not know.

    Args:
        mask: What items and documents mean to attention.
        length: Tokens of a sequence.
        documents: Tokens of a packed document; ``None`` is one document for each sequence.
        items: What every module puts into a sequence, in the order of their names.
    """

    mask: Preset
    length: Distribution
    documents: Distribution | None = None
    items: tuple[ItemRows, ...] = ()

    @classmethod
    def of(cls, model: ModelSpec) -> Self | None:
        """Returns the workload of a model; ``None`` if Megatron's causal attention is right."""
        language = model.language
        if language.mask is None:
            return None
        if language.mask == "causal" and language.tokens_per_document is None:
            return None
        sources = sorted(source for source, end in model.edges if end == LANGUAGE)
        return cls(
            mask=language.mask,
            length=language.tokens_per_item,
            documents=language.tokens_per_document,
            items=tuple(_rows_of(model.modules[name]) for name in sources),
        )


def _rows_of(module: ModuleSpec) -> ItemRows:
    merged = module.output.merged_tokens if isinstance(module.output, Projector) else 1
    return ItemRows(module.items_per_sample, module.tokens_per_item, merged)


def draw(distribution: Distribution, *, count: int, random: np.random.Generator) -> Integers:
    """Draws whole numbers from a distribution."""
    shares = np.array(distribution.shares)
    values = random.choice(np.array(distribution.values), size=count, p=shares / shares.sum())
    return np.rint(values).astype(np.int64)


def draw_masks(workload: Workload, *, count: int) -> tuple[SequenceMask, ...]:
    """Draws sequences.

    Documents fill a sequence one after the other, the last one is cut off. Every item goes to a
    document that has room for it, the likelier the more room it has, and to any place of its
    text; items for which no document has room are left out.

    Args:
        workload: What to draw from.
        count: Sequences.
    """
    random = np.random.default_rng(SEED)
    return tuple(_draw_mask(workload, random) for _ in range(count))


def _draw_mask(workload: Workload, random: np.random.Generator) -> SequenceMask:
    length = max(1, int(draw(workload.length, count=1, random=random)[0]))
    stops = _document_stops(workload.documents, length, random)
    items = _place(list(_draw_rows(workload.items, random)), workload, stops, random)
    return preset_mask(workload.mask, length=length, items=items, document_stops=stops)


def _document_stops(
    documents: Distribution | None, length: int, random: np.random.Generator
) -> list[int]:
    if documents is None:
        return [length]
    stops = [0]
    while stops[-1] < length:
        sizes = draw(documents, count=64, random=random)
        stops += (stops[-1] + np.cumsum(np.maximum(sizes, 1))).tolist()
    inside = [stop for stop in stops[1:] if stop < length]
    return [*inside, length]


def _draw_rows(
    sources: Sequence[ItemRows], random: np.random.Generator
) -> Iterator[tuple[int, int]]:
    """Yields rows and modality of the items of a sequence."""
    for modality, source in enumerate(sources):
        (number,) = draw(source.number, count=1, random=random)
        for tokens in draw(source.tokens, count=int(number), random=random).tolist():
            if rows := tokens // source.merged_tokens:
                yield rows, modality


def _place(
    rows: list[tuple[int, int]],
    workload: Workload,
    stops: Sequence[int],
    random: np.random.Generator,
) -> list[Item]:
    if workload.mask != "encoder_prepended":
        rows = [rows[index] for index in random.permutation(len(rows))]
    room = np.diff(stops, prepend=0)
    inside: dict[int, list[tuple[int, int]]] = {}
    for each in rows:
        fits = np.where(room >= each[0], room, 0)
        if fits.any():
            document = int(random.choice(len(room), p=fits / fits.sum()))
            room[document] -= each[0]
            inside.setdefault(document, []).append(each)
    items = []
    for document, (start, _) in enumerate(pairwise([0, *stops])):
        own = inside.get(document, [])
        # Text before each item; what is prepended has none.
        before = np.sort(random.integers(0, room[document] + 1, size=len(own)))
        before *= workload.mask != "encoder_prepended"
        for text, (size, modality) in zip(before.tolist(), own, strict=True):
            items.append(Item(start + text, start + text + size, modality))
            start += size
    return items
