"""Cuts collated batches along the sample dimension, and joins what was cut.

A loader yields whole microbatches of one language replica; an encoder's task needs other samples.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F

from megatron_mosaic.errors import HostError
from megatron_mosaic.layout.ownership import Interval


def batch_fields(batch: Any) -> dict[str, Any]:
    """Returns what a batch holds by name; it is a mapping or a dataclass.

    Raises:
        HostError: It is neither.
    """
    if isinstance(batch, Mapping):
        return dict(batch)
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        return {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    raise HostError(
        f"data: batch={type(batch).__name__} must be a mapping or a dataclass of tensors; "
        f"let the collate function return one"
    )


def is_absent(value: torch.Tensor) -> bool:
    """Whether a tensor is ``[1, 1]``, with which scripts say that a batch has none of its kind."""
    return value.shape == (1, 1)


def take_samples(
    batch: Any, samples: Interval, *, images: Sequence[int], per_image: Sequence[str]
) -> Any:
    """Cuts consecutive samples out of a batch.

    Args:
        batch: Mapping or dataclass. A tensor has one row for each sample ``[b, ...]``, or for
            each image if it is named in ``per_image``; a list may have an entry for each sample.
        samples: Samples to take, counted from the first of the batch.
        images: Images of every sample of the batch.
        per_image: Names of the tensors with a row for each image ``[images, ...]``.

    Returns:
        A batch of the same type, whose tensors are views.

    Raises:
        HostError: A tensor has another number of rows.
    """
    if samples == (0, len(images)):
        return batch
    rows = slice(sum(images[: samples.start]), sum(images[: samples.stop]))
    return _cut(batch, slice(*samples), rows, images=images, per_image=per_image)


def take_items(
    batch: Any,
    items: Sequence[Sequence[int]],
    *,
    images: Sequence[int],
    per_image: Sequence[str],
) -> Any:
    """Cuts some images out of a batch, and the samples that have any of them.

    Args:
        batch: As :func:`take_samples` takes it.
        items: Images of every sample that are wanted, by their number in the sample, ascending.
        images: Images of every sample of the batch.
        per_image: Names of the tensors with a row for each image ``[images, ...]``.

    Returns:
        A batch of the same type, whose tensors are copies.

    Raises:
        HostError: A tensor has another number of rows.
    """
    if all(len(own) == number > 0 for own, number in zip(items, images, strict=True)):
        return batch
    before = [0, *accumulate(images)]
    samples = [sample for sample, own in enumerate(items) if own]
    rows = [before[sample] + item for sample in samples for item in items[sample]]
    return _cut(batch, samples, rows, images=images, per_image=per_image)


def _cut(
    batch: Any,
    samples: slice | list[int],
    rows: slice | list[int],
    *,
    images: Sequence[int],
    per_image: Sequence[str],
) -> Any:
    """Takes samples of a batch, and rows of what it has for each image."""

    def cut(name: str, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            if is_absent(value):
                return value
            by_image = name in per_image
            _check_rows(name, value, sum(images) if by_image else len(images))
            return value[rows if by_image else samples]
        if isinstance(value, list) and len(value) == len(images):
            return value[samples] if isinstance(samples, slice) else [value[i] for i in samples]
        return value

    return _rebuilt(batch, {name: cut(name, value) for name, value in batch_fields(batch).items()})


def join_samples(batches: Sequence[Any]) -> Any:
    """Puts the samples of batches of one kind one after the other.

    Args:
        batches: At least one. Texts of unlike lengths are filled up with zeros: what is joined is
            for an encoder, which reads no text.

    Returns:
        A batch of the first one's type; what is neither a tensor nor a list is the first one's.

    Raises:
        HostError: The batches hold unlike things.
    """
    if len(batches) == 1:
        return batches[0]
    parts = [batch_fields(batch) for batch in batches]
    for part in parts[1:]:
        if part.keys() != parts[0].keys():
            raise HostError(
                f"data: batch keys={sorted(part)} must equal {sorted(parts[0])} of the batch "
                f"before it; let every batch hold the same"
            )
    joined = {name: _join([part[name] for part in parts]) for name in parts[0]}
    return _rebuilt(batches[0], joined)


def _join(values: list[Any]) -> Any:
    if all(isinstance(value, list) for value in values):
        return [entry for value in values for entry in value]
    if not isinstance(values[0], torch.Tensor):
        return values[0]
    present = [value for value in values if not is_absent(value)]
    if not present:
        return values[0]
    filled = [value for value in present if value.shape[0]] or present[:1]
    longest = [max(sizes) for sizes in zip(*(value.shape[1:] for value in filled), strict=True)]
    return torch.cat([_filled_up(value, longest) for value in filled])


def _filled_up(value: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    missing = [whole - own for whole, own in zip(shape, value.shape[1:], strict=True)]
    # F.pad counts dimensions from the last one, each with what goes before and after.
    return F.pad(value, [pad for size in reversed(missing) for pad in (0, size)])


def _check_rows(name: str, value: torch.Tensor, rows: int) -> None:
    if value.dim() == 0 or value.shape[0] != rows:
        raise HostError(
            f"data: {name} of shape {list(value.shape)} must have {rows} rows, as many as the "
            f"batch has samples or images; collate it so"
        )


def _rebuilt(batch: Any, fields: dict[str, Any]) -> Any:
    if isinstance(batch, Mapping):
        return fields
    return dataclasses.replace(batch, **fields)
