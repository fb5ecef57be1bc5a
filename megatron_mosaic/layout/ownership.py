"""Who owns which samples, and which rows of a boundary tensor.

A boundary tensor has rows ``[rows, hidden]``, sample after sample in global order. All rows here
are counted within one microbatch's boundary tensor, from 0.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from megatron_mosaic.errors import LayoutError
from megatron_mosaic.layout.placement import ModulePlacement
from megatron_mosaic.layout.rows import Interval, Rows, split_evenly
from megatron_mosaic.layout.sharding import SequenceSharding

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
    return sum(run.size for run in runs)


def produced(
    source: ModulePlacement,
    *,
    group_counts: Sequence[int],
    microbatch: Interval,
    item_rows: int = 1,
    item_shards: Sequence[Interval] | None = None,
) -> Ownership:
    """Rows of one microbatch that the last pipeline stage of an encoder produces.

    Args:
        source: The encoder.
        group_counts: Rows of each sample of the group of microbatches that the encoder runs in
            one task.
        microbatch: Samples of that group which form the microbatch.
        item_rows: Rows of one item, such as an image, of which a sample has any number.
        item_shards: Rows of every item that each context-parallel rank makes; None where that
            size is 1.

    Raises:
        LayoutError: The microbatch is not inside the group.
    """
    if not 0 <= microbatch.start <= microbatch.stop <= len(group_counts):
        raise LayoutError(
            f"modules.{source.name}: microbatch={list(microbatch)} must be samples of a group of "
            f"{len(group_counts)}; pass the row counts of the whole group"
        )
    offsets = row_offsets(group_counts)
    samples = encoder_samples(len(group_counts), data_parallel_size=source.data_parallel_size)
    stage = source.pipeline_model_parallel_size - 1
    rows: dict[int, Rows] = {}
    replicas: list[tuple[int, ...]] = []
    for dp, owned in enumerate(samples):
        inside = owned.clip(microbatch)
        first = offsets[microbatch.start]
        whole = Interval(offsets[inside.start] - first, offsets[inside.stop] - first)
        for cp in range(source.context_parallel_size):
            own = Rows.of([whole])
            if item_shards is not None:
                own = Rows.of(_shards(whole, item_rows=item_rows, shard=item_shards[cp]))
            replicas.append(_tensor_parallel_ranks(source, cp=cp, dp=dp, stage=stage))
            rows |= dict.fromkeys(replicas[-1], own)
    return Ownership(rows=rows, replicas=tuple(replicas))


def kept(
    destination: ModulePlacement,
    *,
    samples: Sequence[Runs],
    samples_per_replica: int,
    sharding: SequenceSharding | None = None,
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

    Raises:
        LayoutError: The samples are not those of one microbatch.
    """
    num_samples = samples_per_replica * destination.data_parallel_size
    if len(samples) != num_samples:
        raise LayoutError(
            f"modules.{destination.name}: samples={len(samples)} must number "
            f"micro_batch_size*DP={samples_per_replica}*{destination.data_parallel_size}="
            f"{num_samples}; pass the rows of each sample of the microbatch"
        )
    offsets = row_offsets([count_rows(runs) for runs in samples])
    shares = language_samples(
        samples_per_replica, data_parallel_size=len(samples) // samples_per_replica
    )
    rows: dict[int, Rows] = {}
    replicas: list[tuple[int, ...]] = []
    for dp, share in enumerate(shares):
        for cp in range(destination.context_parallel_size):
            ranks = _tensor_parallel_ranks(destination, cp=cp, dp=dp, stage=0)
            if sharding is None:
                replicas.append(ranks)
                whole = Interval(offsets[share.start], offsets[share.stop])
                rows |= dict.fromkeys(ranks, Rows.of([whole]))
                continue
            for part in range(sharding.tp):
                positions = sharding.positions(cp=cp, tp=part)
                own = Rows.of(
                    row.shift(offsets[sample])
                    for sample in range(*share)
                    for row in rows_at(samples[sample], positions)
                )
                alike = (ranks[part],) if sharding.tp > 1 else ranks
                replicas.append(alike)
                rows |= dict.fromkeys(alike, own)
    return Ownership(rows=rows, replicas=tuple(replicas))


def rows_at(runs: Runs, positions: Rows) -> Iterator[Interval]:
    """Yields the rows of a sample that belong at some positions of its sequence.

    Args:
        runs: Where the sample's rows belong.
        positions: Positions of the sequence.
    """
    before = 0
    for run in runs:
        for inside in positions.inside(run):
            yield inside.shift(before - run.start)
        before += run.size


def _shards(whole: Interval, *, item_rows: int, shard: Interval) -> Iterator[Interval]:
    for first in range(whole.start, whole.stop, item_rows):
        yield shard.shift(first)


def _tensor_parallel_ranks(
    placement: ModulePlacement, *, cp: int, dp: int, stage: int
) -> tuple[int, ...]:
    return tuple(
        placement.rank_at(tp=tp, cp=cp, dp=dp, pp=stage)
        for tp in range(placement.tensor_model_parallel_size)
    )
