"""What a batch for LLaVAModel says of the masks of its samples.

Positions are those of the sequence that the language model sees: the rows of an image stand where
its one token stood in the text.
"""

from collections.abc import Sequence

import numpy as np
import torch

from megatron_mosaic.errors import HostError, LayoutError
from megatron_mosaic.host.data.batches import batch_fields
from megatron_mosaic.host.families.family import Batch, token_ids
from megatron_mosaic.layout.attention import AttentionPlan
from megatron_mosaic.layout.ownership import Runs
from megatron_mosaic.tokens.presets import Item, document_stops, preset_mask
from megatron_mosaic.tokens.ranges import Integers

DOCUMENT_IDS = "document_ids"  # [b, text], ascending; -1 is padding at the end
CU_LENGTHS = "cu_lengths"  # [b, documents + 1], as upstream's multimodal data sets pack


def stops_of_batch(
    batch: Batch,
    *,
    attention: AttentionPlan,
    image_token: int,
    rows_per_image: int,
    sequence_length: int,
) -> list[tuple[int, ...]]:
    """Finds where the documents of every sample end; what lies behind the last one is padding.

    Args:
        batch: What the language model reads, on the host.
        attention: What the plan says.
        image_token: Token that stands for an image.
        rows_per_image: Positions that an image takes.
        sequence_length: Positions of a sequence; what lies beyond is cut off.

    Raises:
        HostError: Documents overlap or are not in order, or there are none where the mask is of
            packed documents.
    """
    fields = batch_fields(batch)
    places = _positions_behind(token_ids(batch), image_token, rows_per_image)
    ids, lengths = fields.get(DOCUMENT_IDS), fields.get(CU_LENGTHS)
    if ids is not None:
        _check_shape(DOCUMENT_IDS, ids, like=places)
        stops = [_stops_of_ids(*each) for each in zip(ids.numpy(), places, strict=True)]
    elif lengths is not None and lengths.shape[-1] > 1:
        stops = [_stops_of_lengths(each) for each in lengths.tolist()]
    elif attention.mask == "multimodal_packed":
        raise HostError(
            f"data: batch keys={sorted(fields)} must include {DOCUMENT_IDS!r} or {CU_LENGTHS!r} "
            f"with mask={attention.mask}; name the document of every token, or use "
            f"mask=encoder_embedded"
        )
    else:
        stops = [(int(each[-1]),) for each in places]
    return [_within(each, sequence_length) for each in stops]


def check_masks(
    samples: Sequence[tuple[Runs, Sequence[int]]], *, attention: AttentionPlan, sequence_length: int
) -> None:
    """Checks that images and documents are where a mask can have them.

    Args:
        samples: Positions of the images of every sample, and where its documents end.
        attention: What the plan says.
        sequence_length: Positions of a sequence.

    Raises:
        HostError: An image lies in two documents or on another one, or behind text that the mask
            has behind all images.
    """
    for runs, stops in samples:
        try:
            preset_mask(
                attention.mask,
                length=sequence_length,
                items=[Item(*run) for run in runs],
                document_stops=stops,
            )
        except LayoutError as error:
            raise _of_data(error) from None


def _positions_behind(tokens: torch.Tensor, image_token: int, rows_per_image: int) -> Integers:
    """Position behind each token of the text, or behind the rows that it stands for."""
    sizes = np.where(tokens.numpy() == image_token, rows_per_image, 1)
    return np.cumsum(sizes, axis=1)


def _check_shape(name: str, given: torch.Tensor, *, like: Integers) -> None:
    if tuple(given.shape) != like.shape:
        raise HostError(
            f"data: {name}={list(given.shape)} must be {list(like.shape)}, as the token ids are; "
            f"name the document of every token"
        )


def _stops_of_ids(ids: Integers, behind: Integers) -> tuple[int, ...]:
    try:
        return tuple(int(behind[stop - 1]) for stop in document_stops(ids))
    except LayoutError as error:
        raise _of_data(error) from None


def _stops_of_lengths(lengths: Sequence[int]) -> tuple[int, ...]:
    """Ends of documents from their cumulative lengths, which may repeat the last one."""
    return tuple(dict.fromkeys(each for each in lengths if each != 0))


def _within(stops: Sequence[int], sequence_length: int) -> tuple[int, ...]:
    """Cuts off what lies beyond the sequence: the document there ends with it."""
    return tuple(dict.fromkeys(min(stop, sequence_length) for stop in stops))


def _of_data(error: LayoutError) -> HostError:
    return HostError(f"data: {str(error).removeprefix('mask: ')}")
