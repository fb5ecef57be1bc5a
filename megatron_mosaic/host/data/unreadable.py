"""Samples that a data set cannot read: named by their place, and passed over where allowed.

A loader's process that raises an error leaves only a traceback of its own, which says nothing of
the sample. So errors travel beside the samples, and are judged where the batch arrives.
"""

import traceback
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch.utils.data import default_collate

from megatron_mosaic.errors import HostError

TRIES = 8
"""Samples after an unreadable one that are tried in its place."""

_SHOWN = 200  # characters of another library's message


class Unreadable(NamedTuple):
    """A sample that could not be read.

    Args:
        index: Its place in the data set.
        error: What went wrong, and where.
    """

    index: int
    error: str


class Reading(NamedTuple):
    """What a loader hands over: a sample or a batch, and what could not be read for it.

    Args:
        content: The sample or batch; None if nothing could be read in a sample's place.
        unreadable: Samples in whose place others are.
    """

    content: Any
    unreadable: tuple[Unreadable, ...] = ()


class NamedSamples(torch.utils.data.Dataset):
    """Reads samples, and the one behind in place of one that cannot be read.

    Every rank that reads a sample passes over the same ones, for errors of a sample are its own.

    Args:
        read: Reads a sample by its index, or some items of it by the index and their numbers.
        length: Samples of the data set.
        tries: Samples behind that are tried.
    """

    def __init__(self, read: Callable[[Any], Any], *, length: int, tries: int) -> None:
        self._read, self._length, self._tries = read, length, tries

    def __getitem__(self, request: int | tuple[int, tuple[int, ...]]) -> Reading:
        first, *items = (request,) if isinstance(request, int) else request
        missed: list[Unreadable] = []
        for index in range(first, first + self._tries + 1):
            index %= self._length
            try:
                return Reading(self._read((index, *items) if items else index), tuple(missed))
            except Exception as error:  # noqa: BLE001 - whatever a data set raises
                missed.append(Unreadable(index, _described(error)))
        return Reading(None, tuple(missed))


class NamedBatches:
    """Collates samples, and hands over with them what could not be read.

    Args:
        collate_fn: The data set's own; ``None`` is torch's.
    """

    def __init__(self, collate_fn: Callable[[list[Any]], Any] | None) -> None:
        self._collate = collate_fn or default_collate

    def __call__(self, readings: Sequence[Reading]) -> Reading:
        missed = tuple(each for reading in readings for each in reading.unreadable)
        contents = [reading.content for reading in readings]
        if any(content is None for content in contents):
            return Reading(None, missed)
        return Reading(self._collate(contents), missed)


class Allowance:
    """Lets a run pass over so many samples on each rank, and says each of them.

    Args:
        limit: How many; with 0 the first one ends the run.
        rank: This rank.
    """

    def __init__(self, limit: int, *, rank: int) -> None:
        self._limit, self._rank = limit, rank
        self._passed: set[int] = set()

    @property
    def tries(self) -> int:
        """Samples behind an unreadable one that are tried in its place."""
        return TRIES if self._limit else 0

    def take(self, reading: Reading) -> Any:
        """Returns the batch.

        Raises:
            HostError: A sample cannot be read, and no more may be passed over.
        """
        for sample in reading.unreadable:
            if sample.index in self._passed:
                continue  # another module of this rank reads it too
            self._passed.add(sample.index)
            if len(self._passed) > self._limit:
                raise self._error(
                    f"sample={sample.index}",
                    sample,
                    f"repair it, or pass over more than {self._limit} samples with "
                    f"--mosaic-max-unreadable-samples",
                )
            print(
                f"mosaic: sample {sample.index} is passed over on rank {self._rank}, the next that "
                f"can be read stands in its place: {sample.error}",
                flush=True,
            )
        if reading.content is None:
            *_, last = reading.unreadable
            first = last.index - self.tries
            raise self._error(f"samples={first}-{last.index}", last, "repair the data set")
        return reading.content

    def _error(self, which: str, sample: Unreadable, remedy: str) -> HostError:
        return HostError(
            f"data: {which} must be readable on rank {self._rank}, not raise {sample.error}; "
            f"{remedy}"
        )


def _described(error: Exception) -> str:
    words = " ".join(str(error).split())
    shown = words if len(words) <= _SHOWN else f"{words[:_SHOWN]}..."
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} '{shown}' at {frame.filename}:{frame.lineno}"
