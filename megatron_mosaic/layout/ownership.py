"""Who owns which samples, and which rows of a boundary tensor.

A boundary tensor has rows ``[rows, hidden]``, sample after sample in global order. All rows here
are counted within one microbatch's boundary tensor, from 0.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Literal

from megatron_mosaic.errors import LayoutError
from megatron_mosaic.layout.dealt import DealtItems
from megatron_mosaic.layout.placement import Coordinates, ModulePlacement
from megatron_mosaic.layout.rows import Interval, Rows, split_evenly
from megatron_mosaic.layout.shard_table import Part, ShardTable, add_rows
from megatron_mosaic.layout.sharding import SequenceSharding

if TYPE_CHECKING:  # it needs numpy, which commands that only read plans do not load
    from megatron_mosaic.layout.sequences import Sharding

TableOf = Callable[[int], ShardTable]
"""Returns who keeps which positions of a sample of a microbatch."""

_Owners = tuple[tuple[int, ...], Rows]  # a set of true replicas, and what each of them has

Runs = tuple[Interval, ...]
"""Where the rows of one sample belong: consecutive positions of its sequence, in row order."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ownership:
    """Rows of one microbatch that the ranks of a layout produce or keep.

    Args:
        rows: Rows of every rank at the boundary; there may be none.
        replicas: Those ranks in sets of true replicas: the same rows, the same values and the
            same full gradient, so one of a set speaks for all. Where the rows of two sets
            overlap, each set has a part of the gradient and the parts add up.
    """

    rows: Mapping[int, Rows]
    replicas: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Selection:
    """The part of an ownership that somebody needs: deriving it costs only what it holds.

    Args:
        samples: Samples of the microbatch; replicas that run none of them are left out.
        position: Place in the grid of a rank, if only its own set of replicas matters.
    """

    samples: Rows
    position: Coordinates | None = None


def encoder_samples(num_samples: int, *, data_parallel_size: int) -> tuple[Interval, ...]:
    """Samples of a group of microbatches that each data-parallel rank of an encoder runs.

    Args:
        num_samples: Samples of the group, counted microbatch after microbatch.
        data_parallel_size: Replicas of the encoder; need not divide ``num_samples``.
    """
    return split_evenly(num_samples, data_parallel_size)


def language_samples(samples_per_replica: int, *, data_parallel_size: int) -> tuple[Interval, ...]:
    """Samples of one microbatch that each data-parallel rank of the language model runs."""
    return tuple(
        Interval(dp * samples_per_replica, (dp + 1) * samples_per_replica)
        for dp in range(data_parallel_size)
    )


def row_offsets(counts: Sequence[int]) -> list[int]:
    """First row of every sample, and the number of rows as last entry.

    Args:
        counts: Rows of each sample, >= 0.
    """
    return list(accumulate(counts, initial=0))


def count_rows(runs: Runs) -> int:
    """Rows of a sample."""
    return sum([stop - start for start, stop in runs])


def replicas_of(samples: Interval, *, num_samples: int, data_parallel_size: int) -> range:
    """Data-parallel ranks of an encoder between which some samples lie, as it splits them.

    Args:
        samples: At least one of the samples of a group of microbatches.
        num_samples: Samples of the group.
        data_parallel_size: Replicas of the encoder.
    """
    # Part p begins at floor(p * n / dp): sample i is in the last part that begins at i or before.
    first, last = (
        ((sample + 1) * data_parallel_size - 1) // num_samples
        for sample in (samples.start, samples.stop - 1)
    )
    return range(first, last + 1)


def produced(
    source: ModulePlacement,
    *,
    offsets: Sequence[int],
    microbatch: Interval,
    group_size: int,
    item_rows: int = 1,
    item_shards: Sequence[Interval] | None = None,
    selection: Selection | None = None,
    dealt: DealtItems | None = None,
) -> Ownership:
    """Rows of one microbatch that the last pipeline stage of an encoder produces.

    Args:
        source: The encoder.
        offsets: First row of each sample of the microbatch, and their number as last entry
            (``row_offsets``).
        microbatch: Which samples these are of the group of microbatches that the encoder runs in
            one task.
        group_size: Samples of that group.
        item_rows: Rows of one item, such as an image, of which a sample has any number.
        item_shards: Rows of every item that each context-parallel rank makes; None where that
            size is 1.
        selection: What is needed of it; None is everything. Replicas are there with all the
            rows that they have.
        dealt: Which replica runs which items, if not equally many consecutive samples each.

    Raises:
        LayoutError: The microbatch is not inside the group, or has not as many samples.
    """
    _check_group(source, offsets, microbatch=microbatch, group_size=group_size)
    dp_size, stage = source.data_parallel_size, source.pipeline_model_parallel_size - 1
    rows: dict[int, Rows] = {}
    replicas: list[tuple[int, ...]] = []

    def running(samples: Interval) -> Iterable[int]:
        if dealt is not None:
            return dealt.replicas(samples)
        own = samples.shift(microbatch.start)
        return replicas_of(own, num_samples=group_size, data_parallel_size=dp_size)

    for dp in _replicas(selection, dp_size, running=running):
        if dealt is not None:
            whole = dealt.rows.get(dp, Rows())
        else:
            own = Interval(dp * group_size // dp_size, (dp + 1) * group_size // dp_size)
            inside = own.clip(microbatch).shift(-microbatch.start)
            whole = Rows.of([Interval(offsets[inside.start], offsets[inside.stop])])
        for cp in _chosen(selection, "cp", source.context_parallel_size):
            made: Iterable[Interval] = whole
            if item_shards is not None:
                made = _shards(whole, item_rows=item_rows, shard=item_shards[cp])
            replicas.append(_tensor_parallel_ranks(source, cp=cp, dp=dp, stage=stage))
            rows |= dict.fromkeys(replicas[-1], Rows.of(made))
    return Ownership(rows=rows, replicas=tuple(replicas))


def _check_group(
    source: ModulePlacement, offsets: Sequence[int], *, microbatch: Interval, group_size: int
) -> None:
    if not 0 <= microbatch.start <= microbatch.stop <= group_size:
        raise LayoutError(
            f"modules.{source.name}: microbatch={list(microbatch)} must be samples of a group of "
            f"{group_size}; pass its place in the group"
        )
    if len(offsets) != microbatch.size + 1:
        raise LayoutError(
            f"modules.{source.name}: offsets={len(offsets)} must number one more than the samples "
            f"of microbatch={list(microbatch)}; pass the row offsets of these samples"
        )


def kept(
    destination: ModulePlacement,
    *,
    samples: Sequence[Runs],
    samples_per_replica: int,
    sharding: "Sharding | None" = None,
    selection: Selection | None = None,
    offsets: Sequence[int] | None = None,
    table_of: TableOf | None = None,
) -> Ownership:
    """Rows of one microbatch that the first pipeline stage of a destination keeps.

    A rank keeps the rows whose positions it keeps of the sequence. Without sharding that are all
    rows of its replica's samples, and tensor-parallel ranks are true replicas of each other.

    Args:
        destination: The module that consumes the boundary tensor.
        samples: Positions of the rows of each sample of the microbatch. Rows beyond the length of
            a sharded sequence are cut off: nobody keeps them.
        samples_per_replica: Samples of one data-parallel replica (``micro_batch_size``).
        sharding: How sequences are split over the ranks of a replica, if they are.
        selection: What is needed of it; None is everything. Only rows of its samples are there.
        offsets: ``row_offsets`` of the samples, if they are known already.
        table_of: Returns who keeps which positions of a sample of the microbatch; needed where
            sequences are not all split alike.

    Raises:
        LayoutError: The samples are not those of one microbatch.
    """
    _check_microbatch(destination, len(samples), samples_per_replica=samples_per_replica)
    if offsets is None:
        offsets = row_offsets([count_rows(runs) for runs in samples])
    if isinstance(sharding, SequenceSharding) and table_of is None:
        table_of = _always(ShardTable.of(sharding))

    def running(samples: Interval) -> range:
        start, stop = samples
        return range(start // samples_per_replica, -(-stop // samples_per_replica))

    owners: list[_Owners] = []
    for dp in _replicas(selection, destination.data_parallel_size, running=running):
        share = Interval(dp * samples_per_replica, (dp + 1) * samples_per_replica)
        inside = [share] if selection is None else list(selection.samples.inside(share))
        if sharding is None or table_of is None:
            whole = Rows.of(Interval(offsets[start], offsets[stop]) for start, stop in inside)
            owners += _kept_whole(destination, whole, dp=dp, selection=selection)
        else:
            parts = _parts(
                samples,
                inside,
                sharding=sharding,
                table_of=table_of,
                offsets=offsets,
                selection=selection,
            )
            owners += _kept_parts(destination, parts, dp=dp, splits_tp=sharding.tp > 1)
    return Ownership(
        rows={rank: rows for ranks, rows in owners for rank in ranks},
        replicas=tuple(ranks for ranks, _ in owners),
    )


def _check_microbatch(
    destination: ModulePlacement, num_samples: int, *, samples_per_replica: int
) -> None:
    expected = samples_per_replica * destination.data_parallel_size
    if num_samples != expected:
        raise LayoutError(
            f"modules.{destination.name}: samples={num_samples} must number "
            f"micro_batch_size*DP={samples_per_replica}*{destination.data_parallel_size}="
            f"{expected}; pass the rows of each sample of the microbatch"
        )


def _kept_whole(
    destination: ModulePlacement, rows: Rows, *, dp: int, selection: Selection | None
) -> Iterator[_Owners]:
    """Ranks of a replica that each keep all its rows, by their context-parallel place."""
    for cp in _chosen(selection, "cp", destination.context_parallel_size):
        yield _tensor_parallel_ranks(destination, cp=cp, dp=dp, stage=0), rows


def _kept_parts(
    destination: ModulePlacement,
    parts: Mapping[Part, Rows],
    *,
    dp: int,
    splits_tp: bool,
) -> Iterator[_Owners]:
    """Ranks of a replica that keep the rows of their part of each sequence.

    Args:
        destination: The module.
        parts: Rows by context- and tensor-parallel place.
        dp: The replica.
        splits_tp: Whether tensor parallelism splits sequences; else its place 0 stands for all.
    """
    for (cp, tp), rows in parts.items():
        ranks = _tensor_parallel_ranks(destination, cp=cp, dp=dp, stage=0)
        yield (ranks[tp],) if splits_tp else ranks, rows


def _always(table: ShardTable) -> TableOf:
    return lambda sample: table


def _parts(
    samples: Sequence[Runs],
    inside: Iterable[Interval],
    *,
    sharding: "Sharding",
    table_of: TableOf,
    offsets: Sequence[int],
    selection: Selection | None,
) -> dict[Part, Rows]:
    """Rows of some samples that each context- and tensor-parallel rank keeps.

    Args:
        samples: Those of a microbatch.
        inside: Which of them.
        sharding: How sequences are split.
        table_of: Returns who keeps which positions of a sample.
        offsets: ``row_offsets`` of the samples.
        selection: Names the one rank whose rows matter, if it does.
    """
    key = None
    if selection is not None and selection.position is not None:
        key = (selection.position.cp, selection.position.tp if sharding.tp > 1 else 0)
    keys = [key] if key else [(cp, tp) for cp in range(sharding.cp) for tp in range(sharding.tp)]
    found: dict[Part, list[Interval]] = {key: [] for key in keys}
    for sample in (sample for span in inside for sample in range(*span)):
        if samples[sample]:
            columns = table_of(sample).columns(key)
            add_rows(found, columns, samples[sample], before=offsets[sample])
    return {key: Rows.of_sorted(intervals) for key, intervals in found.items()}


def _replicas(
    selection: Selection | None,
    dp_size: int,
    *,
    running: Callable[[Interval], Iterable[int]],
) -> Iterable[int]:
    """Replicas of a module that a selection needs.

    Args:
        selection: What is needed; None is everything.
        dp_size: Replicas of the module.
        running: Returns the replicas that run some samples of the microbatch.
    """
    if selection is None:
        return range(dp_size)
    if selection.position is not None:
        return (selection.position.dp,)
    # Samples of two intervals may be one replica's: each once, in order.
    return dict.fromkeys(dp for samples in selection.samples for dp in running(samples))


def _chosen(selection: Selection | None, axis: Literal["cp", "tp"], size: int) -> Sequence[int]:
    """Places on an axis of the grid that a selection needs."""
    if selection is None or selection.position is None or size == 1:
        return range(size)
    return (getattr(selection.position, axis),)


def _shards(whole: Rows, *, item_rows: int, shard: Interval) -> Iterator[Interval]:
    for start, stop in whole:
        for first in range(start, stop, item_rows):
            yield shard.shift(first)


def _tensor_parallel_ranks(
    placement: ModulePlacement, *, cp: int, dp: int, stage: int
) -> tuple[int, ...]:
    """Ranks that differ in their tensor-parallel place, the fastest of the grid."""
    tp_size, cp_size = placement.tensor_model_parallel_size, placement.context_parallel_size
    first = tp_size * (cp + cp_size * (dp + placement.data_parallel_size * stage))
    return placement.ranks[first : first + tp_size]
