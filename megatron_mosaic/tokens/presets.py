"""Masks of multimodal sequences by name, from what a batch says of each of them.

A batch says where the items of a sequence lie (images, sounds), where its documents end if
several are packed, and how long it is before padding. A preset says what that means:

    causal               items are like text
    prefix_lm            of a document, all until its last item ends sees each other
    encoder_prepended    an item sees itself; items come first in a document
    encoder_embedded     an item sees itself, anywhere; one document
    multimodal_packed    an item sees itself, anywhere; any number of documents
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from megatron_mosaic.errors import LayoutError
from megatron_mosaic.tokens.mask import (
    NO_DOCUMENT,
    ModalitySees,
    Segment,
    SequenceMask,
    modality_tokens,
    padding,
    text,
)
from megatron_mosaic.tokens.names import Preset
from megatron_mosaic.tokens.ranges import Integers

# Masks of sequences that are not packed.
ONE_DOCUMENT: frozenset[Preset] = frozenset(("encoder_prepended", "encoder_embedded"))


class Item(NamedTuple):
    """Tokens of an image or a sound.

    Attributes:
        start: First position.
        stop: Behind the last position.
        modality: Number of its modality.
        group: Items of one group and document see each other; None is a group of its own.
    """

    start: int
    stop: int
    modality: int = 0
    group: int | None = None


def preset_mask(
    preset: Preset,
    *,
    length: int,
    items: Sequence[Item] = (),
    document_stops: Sequence[int] | None = None,
    item_sees: ModalitySees = "own",
) -> SequenceMask:
    """Builds the mask of a sequence.

    Args:
        preset: What items and documents mean.
        length: Tokens of the sequence, padding included.
        items: Its items, ascending; what lies behind the documents is cut off.
        document_stops: Where each packed document ends, ascending, and padding begins after the
            last one; None is one document without padding.
        item_sees: What the tokens of an item see beside their group.

    Raises:
        LayoutError: Items overlap, lie in two documents or are not where the preset has them, or
            documents overlap or do not fit into the sequence.
    """
    stops = [length] if document_stops is None else list(document_stops)
    _check_documents(preset, stops, length=length)
    kept = [each._replace(stop=min(each.stop, stops[-1])) for each in items if stops]
    kept = [each for each in kept if each.start < each.stop]
    _check_items(kept)
    segments: list[Segment] = []
    for document, (start, stop) in enumerate(pairwise([0, *stops])):
        inside = [each for each in kept if start <= each.start < stop]
        _check_inside(preset, inside, document=document, start=start, stop=stop)
        segments += _document(preset, inside, document, start, stop, item_sees)
    segments.append(padding(length - (stops[-1] if stops else 0)))
    return SequenceMask.of(segments)


def document_stops(ids: Integers) -> list[int]:
    """Finds where documents end, from the document of every token.

    Args:
        ids: Ids ``[tokens]``, ascending; -1 for padding at the end.

    Raises:
        LayoutError: An id is less than the one before it, or padding is not at the end.
    """
    real = int(np.count_nonzero(ids != NO_DOCUMENT))
    if (ids[real:] != NO_DOCUMENT).any():
        place = int(np.argmax(ids == NO_DOCUMENT))
        raise LayoutError(
            f"mask: document={NO_DOCUMENT} at position {place} must not come before a document; "
            f"put the padding of a sequence at its end"
        )
    steps = np.diff(ids[:real])
    if (steps < 0).any():
        place = int(np.argmax(steps < 0)) + 1
        raise LayoutError(
            f"mask: document={ids[place]} at position {place} must be >= {ids[place - 1]} of the "
            f"token before it; number the documents of a sequence in ascending order"
        )
    stops = (np.flatnonzero(steps) + 1).tolist()
    return [*stops, real] if real else []


def _document(
    preset: Preset,
    items: Sequence[Item],
    document: int,
    start: int,
    stop: int,
    item_sees: ModalitySees,
) -> Iterator[Segment]:
    """Segments of one document, in order."""
    if preset == "prefix_lm" and items:
        # The text of a prefix belongs to its group, so the prefix is one item.
        items = [Item(start, items[-1].stop)]
    if preset == "causal":
        items = []
    groups = max((each.group for each in items if each.group is not None), default=-1)
    position = start
    for number, item in enumerate(items, start=groups + 1):
        yield text(item.start - position, document=document)
        yield modality_tokens(
            item.stop - item.start,
            group=number if item.group is None else item.group,
            document=document,
            modality=item.modality,
            sees=item_sees,
        )
        position = item.stop
    yield text(stop - position, document=document)


def _check_documents(preset: Preset, stops: Sequence[int], *, length: int) -> None:
    for before, stop in pairwise([0, *stops]):
        if stop <= before:
            raise LayoutError(
                f"mask: document_stop={stop} must be > {before} of the document before it; "
                f"leave out empty documents, and do not let documents overlap"
            )
    if stops and stops[-1] > length:
        raise LayoutError(
            f"mask: document_stop={stops[-1]} must be <= length={length} of the sequence; "
            f"count the tokens that images become"
        )
    if len(stops) > 1 and preset in ONE_DOCUMENT:
        raise LayoutError(
            f"mask: documents={len(stops)} must be 1 with mask={preset}; use mask=multimodal_packed"
        )


def _check_items(items: Iterable[Item]) -> None:
    for before, item in pairwise([Item(0, 0), *items]):
        if item.start < before.stop:
            raise LayoutError(
                f"mask: start={item.start} of an item must be >= {before.stop}, where the item "
                f"before it ends; items of a sequence must not overlap"
            )


def _check_inside(
    preset: Preset, items: Sequence[Item], *, document: int, start: int, stop: int
) -> None:
    position = start
    for item in items:
        if item.stop > stop:
            raise LayoutError(
                f"mask: stop={item.stop} of an item must be <= {stop}, where its document "
                f"{document} ends; keep the tokens of an item in one document"
            )
        if preset == "encoder_prepended" and item.start != position:
            raise LayoutError(
                f"mask: start={item.start} of an item must be {position} with "
                f"mask=encoder_prepended, before all text; use mask=encoder_embedded"
            )
        position = item.stop
