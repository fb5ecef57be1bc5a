"""What every rank knows of a sample, though only some ranks read it."""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from megatron_mosaic.errors import HostError
from megatron_mosaic.host.families.family import Batch, ModuleBoundary, token_ids
from megatron_mosaic.layout.attention import AttentionPlan
from megatron_mosaic.layout.ownership import Runs, count_rows
from megatron_mosaic.layout.rows import Interval
from megatron_mosaic.layout.sequences import SampleSequence
from megatron_mosaic.tokens.presets import ONE_DOCUMENT

UNREAD = torch.iinfo(torch.int64).min
_NO_RUN = -1
_BITS = 62  # of a value: the sign and UNREAD stay free

Documents = Literal["none", "one", "many"]


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleFacts:
    """Facts of one sample; all ranks that read it must find the same.

    Args:
        text_checksum: Of its token ids, so that ranks notice when they read unlike samples.
        rows: Where its boundary rows belong, by the module that makes them. A rank finds those
            that its modules make or keep.
        document_stops: Where its documents end, before padding; None where the plan asks for no
            mask, or the rank does not run the language model.
    """

    text_checksum: int
    rows: Mapping[str, Runs]
    document_stops: tuple[int, ...] | None = None

    @property
    def sequence(self) -> SampleSequence:
        """What decides where the tokens of the sample go, if its mask does."""
        items = sorted(run for runs in self.rows.values() for run in runs if run.size)
        return SampleSequence(tuple(items), self.document_stops)


def sample_facts(batch: Batch, boundary: ModuleBoundary) -> list[SampleFacts]:
    """Finds the facts of every sample of a batch.

    Args:
        batch: What a module of this rank reads, on the host.
        boundary: The module's.

    Raises:
        HostError: The batch contradicts itself, or lacks what is counted.
    """
    rows = boundary.row_runs(batch)
    stops = boundary.document_stops(batch)
    return [
        SampleFacts(
            text_checksum=checksum,
            rows={source: runs[sample] for source, runs in rows.items()},
            document_stops=None if stops is None else stops[sample],
        )
        for sample, checksum in enumerate(_text_checksums(batch))
    ]


def check_texts(batch: Batch, expected: Sequence[int]) -> None:
    """Checks that the samples of a batch are those whose facts all ranks know.

    Args:
        batch: What was read of them.
        expected: ``text_checksum`` of every sample.

    Raises:
        HostError: One is another.
    """
    found = _text_checksums(batch)
    if found != list(expected):
        raise HostError(
            f"data: text_checksum={found[:2]}... of the samples with this rank's items must equal "
            f"{list(expected[:2])}... that another rank reads; make the data set return the same "
            f"sample for the same index"
        )


def _text_checksums(batch: Batch) -> list[int]:
    return [zlib.crc32(ids.numpy().tobytes()) for ids in token_ids(batch)]


def documents_of(attention: AttentionPlan | None) -> Documents:
    """How many documents a sample may have whose ends every rank must know."""
    if attention is None:
        return "none"
    return "one" if attention.mask in ONE_DOCUMENT else "many"


@dataclass(frozen=True, kw_only=True, slots=True)
class FactsLayout:
    """How the facts of a sample are laid out as int64 values, as many for every sample.

    Args:
        sources: Modules that make rows, in order.
        item_rows: Rows of an item of each source whose positions are told: those that go to ranks
            with parts of sequences. Of the others only the number of rows is.
        sequence_length: Positions of a sequence; where rows beyond it belong is not told.
        documents: How many documents a sample may have, whose ends are told.
    """

    sources: tuple[str, ...]
    item_rows: Mapping[str, int]
    sequence_length: int
    documents: Documents = "none"

    @property
    def size(self) -> int:
        """Values of a sample."""
        return len(self._columns())

    def row(self, facts: SampleFacts) -> tuple[int, ...]:
        """Values of a sample; those that this rank did not find are ``UNREAD``."""
        values = [facts.text_checksum]
        for source in self.sources:
            runs = facts.rows.get(source)
            starts = self._num_starts(source)
            if runs is None:
                values += [UNREAD] * (1 + starts)
                continue
            own = [run.start for run in runs][:starts]
            values += [count_rows(runs), *own, *[_NO_RUN] * (starts - len(own))]
        return (*values, *self._stop_values(facts.document_stops))

    def facts(self, row: Sequence[int]) -> SampleFacts:
        """Inverse of :meth:`row`, of values that some rank found."""
        checksum, *values = row
        rows: dict[str, Runs] = {}
        for source in self.sources:
            count, *values = values
            starts, values = (
                values[: self._num_starts(source)],
                values[self._num_starts(source) :],
            )
            rows[source] = self._runs(source, count, [start for start in starts if start >= 0])
        return SampleFacts(
            text_checksum=checksum, rows=rows, document_stops=self._document_stops(values)
        )

    def name(self, column: int) -> str:
        """What a value is, in messages."""
        return self._columns()[column]

    def _runs(self, source: str, count: int, starts: Sequence[int]) -> Runs:
        if source not in self.item_rows:
            return (Interval(0, count),)
        size = self.item_rows[source]
        runs = [Interval(start, start + size) for start in starts]
        rest = count - size * len(runs)
        beyond = [Interval(self.sequence_length, self.sequence_length + rest)] if rest else []
        return (*runs, *beyond)

    def _num_stop_values(self) -> int:
        """Values that tell where documents end: one place, or one bit for every place."""
        if self.documents == "many":
            return -(-self.sequence_length // _BITS)
        return int(self.documents == "one")

    def _stop_values(self, stops: Sequence[int] | None) -> list[int]:
        if stops is None:
            return [UNREAD] * self._num_stop_values()
        if self.documents == "one":
            return [max(stops, default=0)]
        words = [0] * self._num_stop_values()
        for stop in stops:
            words[(stop - 1) // _BITS] |= 1 << (stop - 1) % _BITS
        return words

    def _document_stops(self, values: Sequence[int]) -> tuple[int, ...] | None:
        if self.documents == "none":
            return None
        if self.documents == "one":
            return tuple(stop for stop in values if stop)
        return tuple(
            number * _BITS + bit + 1
            for number, word in enumerate(values)
            if word
            for bit in range(_BITS)
            if word >> bit & 1
        )

    def _num_starts(self, source: str) -> int:
        """Items of a sample that begin inside the sequence, at most."""
        size = self.item_rows.get(source)
        return 0 if size is None else -(-self.sequence_length // size)

    def _columns(self) -> list[str]:
        columns = ["text_checksum"]
        for source in self.sources:
            columns += [f"{source}_rows", *[f"{source}_position"] * self._num_starts(source)]
        return columns + ["document_stop"] * self._num_stop_values()
