"""The least bytes that ranks can receive at a boundary, found row by row.

Nothing here comes from the package that is measured: who makes and who keeps a row is worked out
from the order of ranks (tp-cp-dp-pp), from consecutive samples of data-parallel replicas, from
Megatron's order of context-parallel chunks and from the consecutive parts of sequence parallelism.
Under a mask the package says which context-parallel rank has which token, for that is a choice;
what follows from it is worked out here token by token.

A rank must receive the rows that it keeps and has not made, and the gradients of the rows that it
made, somebody keeps and it does not keep itself. Every replica counts for itself.

That is also the least for tensor-parallel replicas: of ``n`` rows each receives a share of
``n / tp`` from elsewhere and ``n * (tp - 1) / tp`` in an all-gather among them, ``n`` together. The
all-gather has equal shares, so ``n`` is rounded up to a multiple of ``tp`` there: this padding,
fewer than ``tp`` rows, is the bound of what a rank may receive beyond the least.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from benchmarks.layout_pairs import (
    FIRST_POSITION,
    ITEM_ROWS,
    MASK,
    SEQUENCE_LENGTH,
    TEXT_BETWEEN,
    Pair,
    Side,
)
from megatron_mosaic.layout.attention import AttentionPlan
from megatron_mosaic.layout.rows import Interval
from megatron_mosaic.layout.sequences import SampleSequence, sample_assignment


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a boundary tensor.

    Args:
        sample: Its sample.
        place: Its place in its item.
        position: Its position in the sample's sequence.
    """

    sample: int
    place: int
    position: int


def rows_of(pair: Pair) -> list[Row]:
    """Rows of a microbatch, sample after sample."""
    rows = []
    for sample, num_items in enumerate(pair.items):
        for item in range(num_items):
            first = FIRST_POSITION + item * (ITEM_ROWS + TEXT_BETWEEN)
            rows += [Row(sample, place, first + place) for place in range(ITEM_ROWS)]
    return rows


def rows_made(pair: Pair, rank: int) -> set[int]:
    """Rows that a rank makes: on the last stage of the source."""
    side, found = pair.source, set()
    for _, cp, dp, pp in places_of(side, rank):
        if pp != side.pp - 1:
            continue
        for index, row in enumerate(rows_of(pair)):
            replica = max(d for d in range(side.dp) if d * len(pair.items) // side.dp <= row.sample)
            if replica == dp and row.place // (ITEM_ROWS // side.cp) == cp:
                found.add(index)
    return found


def rows_kept(pair: Pair, rank: int) -> set[int]:
    """Rows that a rank keeps: on the first stage of the destination."""
    side, found = pair.destination, set()
    samples_per_replica = len(pair.items) // side.dp
    for tp, cp, dp, pp in places_of(side, rank):
        if pp != 0:
            continue
        own = range(dp * samples_per_replica, (dp + 1) * samples_per_replica)
        positions = {sample: _kept_of(pair, sample, cp=cp, tp=tp) for sample in own}
        for index, row in enumerate(rows_of(pair)):
            if row.position in positions.get(row.sample, ()):
                found.add(index)
    return found


def least_rows(pair: Pair, rank: int) -> tuple[int, int]:
    """Rows that a rank must receive: of activations, and of gradients."""
    made, kept = rows_made(pair, rank), rows_kept(pair, rank)
    kept_by_someone = set().union(*(rows_kept(pair, other) for other in pair.destination.ranks))
    return len(kept - made), len((made & kept_by_someone) - kept)


def places_of(side: Side, rank: int) -> Iterator[tuple[int, int, int, int]]:
    """Yields a rank's place (tp, cp, dp, pp) in a module's grid, if it is there."""
    index = 0
    for pp in range(side.pp):
        for dp in range(side.dp):
            for cp in range(side.cp):
                for tp in range(side.tp):
                    if side.ranks[index] == rank:
                        yield tp, cp, dp, pp
                    index += 1


def sequence_of(pair: Pair, sample: int) -> SampleSequence:
    """Where the items of a sample lie."""
    first = [row.position for row in rows_of(pair) if row.sample == sample and row.place == 0]
    return SampleSequence(tuple(Interval(start, start + ITEM_ROWS) for start in first))


@cache
def _kept_of(pair: Pair, sample: int, *, cp: int, tp: int) -> frozenset[int]:
    """Positions of a sample that a rank of its replica has."""
    side = pair.destination
    if side.tokens is None:
        return frozenset(_positions(side, cp=cp, tp=tp))
    size = len(pair.items) // side.dp
    replica = range(sample // size * size, (sample // size + 1) * size)
    most = max(_ranks_of_tokens(pair, each).count(c) for each in replica for c in range(side.cp))
    own = [position for position, c in enumerate(_ranks_of_tokens(pair, sample)) if c == cp]
    if not side.sp:
        return frozenset(own)
    part = -(-most // side.tp)
    return frozenset(own[tp * part : (tp + 1) * part])


@cache
def _ranks_of_tokens(pair: Pair, sample: int) -> list[int]:
    """Context-parallel rank of every token of a sample."""
    assert pair.destination.tokens is not None
    assignment = sample_assignment(
        AttentionPlan(mask=MASK, tokens=pair.destination.tokens),
        sequence_of(pair, sample),
        length=SEQUENCE_LENGTH,
        cp=pair.destination.cp,
    )
    return assignment.owner.repeat(assignment.cut.sizes).tolist()


def _positions(side: Side, *, cp: int, tp: int) -> list[int]:
    """Positions of a sequence that a rank has, in its order."""
    positions = list(range(SEQUENCE_LENGTH))
    if side.cp > 1:
        # 2 * cp chunks; rank i has chunk i from the front and chunk i from the back.
        chunk = SEQUENCE_LENGTH // (2 * side.cp)
        chunks = [positions[first : first + chunk] for first in range(0, SEQUENCE_LENGTH, chunk)]
        positions = chunks[cp] + chunks[2 * side.cp - 1 - cp]
    if side.sp:
        part = len(positions) // side.tp
        positions = positions[tp * part : (tp + 1) * part]
    return positions
