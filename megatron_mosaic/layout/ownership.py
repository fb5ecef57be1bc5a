"""Who owns which samples, and which tokens of a boundary tensor.

A boundary tensor has rows ``[tokens, hidden]``, sample after sample in global order. All
token intervals here count rows of one microbatch's boundary tensor, from 0.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import NamedTuple

from megatron_mosaic.errors import LayoutError
from megatron_mosaic.layout.placement import ModulePlacement


class Interval(NamedTuple):
    """Consecutive samples or tokens ``[start, stop)``; empty if both are equal."""

    start: int
    stop: int

    @property
    def size(self) -> int:
        """Samples or tokens in the interval."""
        return self.stop - self.start

    def clip(self, bounds: "Interval") -> "Interval":
        """Part of the interval inside ``bounds``; empty, at the nearer bound, if there is none."""
        start = min(max(self.start, bounds.start), bounds.stop)
        return Interval(start, max(start, min(self.stop, bounds.stop)))


@dataclass(frozen=True, kw_only=True, slots=True)
class Ownership:
    """Token intervals of one microbatch that the ranks of a layout produce or keep.

    Args:
        intervals: Interval of every rank at the boundary; it may be empty.
        replicas: Those ranks in sets of true replicas: the same interval, the same values and
            the same full gradient, so one of a set speaks for all. Where the intervals of two
            sets overlap, each set has a part of the gradient and the parts add up.
    """

    intervals: Mapping[int, Interval]
    replicas: tuple[tuple[int, ...], ...]


def split_evenly(total: int, parts: int) -> tuple[Interval, ...]:
    """Splits ``total`` items into consecutive intervals whose sizes differ by one at most.

    Part ``i`` is ``[floor(i * total / parts), floor((i + 1) * total / parts))``, so parts are
    empty where there are fewer items than parts.
    """
    bounds = [part * total // parts for part in range(parts + 1)]
    return tuple(Interval(*pair) for pair in pairwise(bounds))


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


def token_offsets(counts: Sequence[int]) -> list[int]:
    """First token of every sample, and the number of tokens as last entry.

    Args:
        counts: Tokens of each sample, >= 0.
    """
    return list(accumulate(counts, initial=0))


def produced(
    source: ModulePlacement, *, group_counts: Sequence[int], microbatch: Interval
) -> Ownership:
    """Tokens of one microbatch that the last pipeline stage of an encoder produces.

    Args:
        source: The encoder.
        group_counts: Tokens of each sample of the group of microbatches that the encoder runs
            in one task.
        microbatch: Samples of that group which form the microbatch.

    Raises:
        LayoutError: The microbatch is not inside the group.
    """
    assert source.context_parallel_size == 1, "how an encoder shards its output is not decided"
    if not 0 <= microbatch.start <= microbatch.stop <= len(group_counts):
        raise LayoutError(
            f"modules.{source.name}: microbatch={list(microbatch)} must be samples of a group of "
            f"{len(group_counts)}; pass the token counts of the whole group"
        )
    offsets = token_offsets(group_counts)
    samples = encoder_samples(len(group_counts), data_parallel_size=source.data_parallel_size)
    tokens = [
        _tokens(owned.clip(microbatch), offsets, first=offsets[microbatch.start])
        for owned in samples
    ]
    return _ownership(source, source.pipeline_model_parallel_size - 1, tokens)


def kept(
    destination: ModulePlacement, *, counts: Sequence[int], samples_per_replica: int
) -> Ownership:
    """Tokens of one microbatch that the first pipeline stage of a destination keeps.

    Every rank of a data-parallel replica keeps all tokens of the replica's samples and merges
    them with the text itself. With sequence parallel the merged rows are scattered afterwards;
    the gradient of that scatter is an all-gather, so tensor-parallel ranks stay true replicas.
    Context-parallel ranks slice instead, so each has its part of the gradient.

    Args:
        destination: The module that consumes the boundary tensor.
        counts: Tokens of each sample of the microbatch.
        samples_per_replica: Samples of one data-parallel replica (``micro_batch_size``).

    Raises:
        LayoutError: The counts are not one for each sample of the microbatch.
    """
    num_samples = samples_per_replica * destination.data_parallel_size
    if len(counts) != num_samples:
        raise LayoutError(
            f"modules.{destination.name}: token counts={len(counts)} must number "
            f"micro_batch_size*DP={samples_per_replica}*{destination.data_parallel_size}="
            f"{num_samples}; pass one count for each sample of the microbatch"
        )
    offsets = token_offsets(counts)
    samples = language_samples(
        samples_per_replica, data_parallel_size=destination.data_parallel_size
    )
    tokens = [_tokens(owned, offsets, first=0) for owned in samples]
    return _ownership(destination, 0, tokens)


def _tokens(samples: Interval, offsets: Sequence[int], *, first: int) -> Interval:
    return Interval(offsets[samples.start] - first, offsets[samples.stop] - first)


def _ownership(
    placement: ModulePlacement, stage: int, tokens_of_dp: Sequence[Interval]
) -> Ownership:
    """Gives every rank of a stage the tokens of its data-parallel rank."""
    intervals: dict[int, Interval] = {}
    replicas: list[tuple[int, ...]] = []
    for dp, tokens in enumerate(tokens_of_dp):
        for cp in range(placement.context_parallel_size):
            ranks = tuple(
                placement.rank_at(tp=tp, cp=cp, dp=dp, pp=stage)
                for tp in range(placement.tensor_model_parallel_size)
            )
            intervals |= dict.fromkeys(ranks, tokens)
            replicas.append(ranks)
    return Ownership(intervals=intervals, replicas=tuple(replicas))
