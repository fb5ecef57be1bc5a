from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_mosaic.errors import LayoutError
from megatron_mosaic.layout.ownership import (
    encoder_samples,
    kept,
    language_samples,
    produced,
    row_offsets,
)
from megatron_mosaic.layout.placement import ModulePlacement
from megatron_mosaic.layout.rows import Interval, Places, Rows, split_evenly
from megatron_mosaic.layout.sharding import SequenceSharding

COUNTS = st.integers(0, 3)


def runs_of(counts):
    return [(Interval(0, count),) for count in counts]


def placement_of(name, *, tp=1, cp=1, dp=1, pp=1):
    return ModulePlacement(
        name=name,
        ranks=tuple(range(tp * cp * dp * pp)),
        tensor_model_parallel_size=tp,
        context_parallel_size=cp,
        data_parallel_size=dp,
        pipeline_model_parallel_size=pp,
    )


def made_by(vision, *, group_counts, microbatch):
    return produced(
        vision,
        offsets=row_offsets(group_counts[slice(*microbatch)]),
        microbatch=microbatch,
        group_size=len(group_counts),
    )


@st.composite
def groups_of_microbatches(draw):
    samples = draw(st.integers(1, 5))
    num_microbatches = draw(st.integers(1, 4))
    num_samples = samples * num_microbatches
    counts = draw(st.lists(COUNTS, min_size=num_samples, max_size=num_samples))
    index = draw(st.integers(0, num_microbatches - 1))
    return counts, Interval(index * samples, (index + 1) * samples)


def test_split_evenly_spreads_the_rest():
    # floor(7/3) = 2, floor(14/3) = 4, floor(21/3) = 7
    assert split_evenly(7, 3) == ((0, 2), (2, 4), (4, 7))


def test_split_evenly_leaves_parts_empty():
    # floor(2/4) = 0, floor(4/4) = 1, floor(6/4) = 1, floor(8/4) = 2
    assert split_evenly(2, 4) == ((0, 0), (0, 1), (1, 1), (1, 2))


@given(st.integers(0, 50), st.integers(1, 12))
def test_split_evenly_covers_everything_in_order(total, parts):
    intervals = split_evenly(total, parts)

    assert [item for part in intervals for item in range(*part)] == list(range(total))


@given(st.integers(0, 50), st.integers(1, 12))
def test_split_evenly_is_even(total, parts):
    sizes = [part.size for part in split_evenly(total, parts)]

    assert len(sizes) == parts
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(
    ("interval", "clipped"),
    [
        (Interval(2, 8), (4, 6)),
        (Interval(5, 9), (5, 6)),
        (Interval(0, 3), (4, 4)),
        (Interval(7, 9), (6, 6)),
    ],
)
def test_interval_clip_stays_inside_bounds(interval, clipped):
    assert interval.clip(Interval(4, 6)) == clipped


def test_language_samples_are_whole_microbatches_of_replicas():
    assert language_samples(2, data_parallel_size=3) == ((0, 2), (2, 4), (4, 6))


def test_row_offsets_end_with_the_total():
    assert row_offsets([3, 0, 2]) == [0, 3, 3, 5]


def test_produced_clips_the_group_to_the_microbatch():
    vision = placement_of("vision", dp=2)

    # Six samples, three for each replica; the microbatch is samples 2 and 3, of 2 and 5 tokens.
    owned = made_by(vision, group_counts=[3, 0, 2, 5, 1, 1], microbatch=Interval(2, 4))

    assert owned.rows == {0: ((0, 2),), 1: ((2, 7),)}


def test_produced_is_empty_on_replicas_outside_the_microbatch():
    vision = placement_of("vision", dp=4)

    owned = made_by(vision, group_counts=[3, 1, 2, 5], microbatch=Interval(2, 4))

    assert owned.rows == {0: (), 1: (), 2: ((0, 2),), 3: ((2, 7),)}


def test_produced_belongs_to_last_stage_and_its_tensor_parallel_replicas():
    vision = placement_of("vision", tp=2, dp=2, pp=2)

    owned = made_by(vision, group_counts=[1, 4], microbatch=Interval(0, 2))

    assert owned.rows == {4: ((0, 1),), 5: ((0, 1),), 6: ((1, 5),), 7: ((1, 5),)}
    assert owned.replicas == ((4, 5), (6, 7))


def test_kept_belongs_to_first_stage_and_its_tensor_parallel_replicas():
    language = placement_of("language", tp=2, dp=2, pp=2)

    owned = kept(language, samples=runs_of([1, 4, 0, 2]), samples_per_replica=2)

    assert owned.rows == {0: ((0, 5),), 1: ((0, 5),), 2: ((5, 7),), 3: ((5, 7),)}
    assert owned.replicas == ((0, 1), (2, 3))


def test_kept_rows_are_those_at_the_positions_of_a_context_parallel_rank():
    language = placement_of("language", tp=2, cp=2)
    sharding = SequenceSharding(sequence_length=8, cp=2)

    # Rows 0-3 belong at positions 1-4, rows 4-5 at 6-7. Positions 0, 1, 6, 7 are on cp 0.
    samples = [(Interval(1, 5), Interval(6, 8))]
    owned = kept(language, samples=samples, samples_per_replica=1, sharding=sharding)

    first, second = ((0, 1), (4, 6)), ((1, 4),)
    assert owned.rows == {0: first, 1: first, 2: second, 3: second}
    assert owned.replicas == ((0, 1), (2, 3))


def test_kept_rows_with_sequence_parallelism_are_on_one_rank_each():
    language = placement_of("language", tp=2)
    sharding = SequenceSharding(sequence_length=8, tp=2)

    owned = kept(
        language,
        samples=[(Interval(1, 6),), (), (Interval(7, 9),)],
        samples_per_replica=3,
        sharding=sharding,
    )

    # Positions 0-3 are on rank 0. The last sample's second row lies beyond the sequence.
    assert owned.rows == {0: ((0, 3),), 1: ((3, 6),)}
    assert owned.replicas == ((0,), (1,))


def test_produced_rows_of_context_parallel_ranks_are_parts_of_every_item():
    vision = placement_of("vision", cp=2)
    shards = (Interval(0, 1), Interval(1, 3))

    owned = produced(
        vision,
        offsets=row_offsets([3, 0, 6]),
        microbatch=Interval(0, 3),
        group_size=3,
        item_rows=3,
        item_shards=shards,
    )

    assert owned.rows == {0: ((0, 1), (3, 4), (6, 7)), 1: ((1, 3), (4, 6), (7, 9))}
    assert owned.replicas == ((0,), (1,))


@given(st.integers(1, 4), st.sampled_from([1, 2, 4]), st.integers(1, 3))
def test_positions_of_all_ranks_are_the_sequence_once(cp, tp, chunk):
    length = 2 * cp * tp * chunk
    sharding = SequenceSharding(sequence_length=length, cp=cp, tp=tp)

    parts = [sharding.positions(cp=c, tp=t) for c in range(cp) for t in range(tp)]

    assert {part.size for part in parts} == {sharding.local_length}
    assert sorted(row for part in parts for row in part.numbers()) == list(range(length))


def test_positions_of_context_and_sequence_parallel_ranks():
    sharding = SequenceSharding(sequence_length=8, cp=2, tp=2)

    # Chunks 0-1 and 6-7 on cp 0, 2-5 on cp 1; each half is a tensor-parallel rank's.
    assert sharding.positions(cp=0, tp=0) == ((0, 2),)
    assert sharding.positions(cp=0, tp=1) == ((6, 8),)
    assert sharding.positions(cp=1, tp=0) == ((2, 4),)
    assert sharding.positions(cp=1, tp=1) == ((4, 6),)


def test_sharding_refuses_a_length_that_cannot_be_split():
    with pytest.raises(LayoutError, match=r"sequence length=12 must be a multiple of 2\*2\*2=8"):
        SequenceSharding(sequence_length=12, cp=2, tp=2)


@given(groups_of_microbatches(), st.integers(1, 7), st.integers(1, 2), st.integers(1, 2))
def test_produced_equals_ownership_token_by_token(group, dp, tp, pp):
    counts, microbatch = group
    vision = placement_of("vision", tp=tp, dp=dp, pp=pp)

    owned = made_by(vision, group_counts=counts, microbatch=microbatch)

    # Every token of the microbatch in order, as the data-parallel rank that runs its sample.
    runs = {}
    for replica, samples in enumerate(encoder_samples(len(counts), data_parallel_size=dp)):
        runs |= dict.fromkeys(range(*samples), replica)
    owners = [runs[sample] for sample in range(*microbatch) for _ in range(counts[sample])]
    assert set(owned.rows) == set(vision.stage_ranks(pp - 1))
    for rank, rows in owned.rows.items():
        replica = vision.coordinates(rank).dp
        assert list(rows.numbers()) == [t for t, owner in enumerate(owners) if owner == replica]


@given(st.integers(1, 5), st.integers(1, 3), st.integers(1, 2), st.data())
def test_kept_equals_ownership_token_by_token(dp, samples, tp, data):
    counts = data.draw(st.lists(COUNTS, min_size=dp * samples, max_size=dp * samples))
    language = placement_of("language", tp=tp, dp=dp, pp=2)

    owned = kept(language, samples=runs_of(counts), samples_per_replica=samples)

    owners = [sample // samples for sample, count in enumerate(counts) for _ in range(count)]
    assert set(owned.rows) == set(language.stage_ranks(0))
    for rank, rows in owned.rows.items():
        replica = language.coordinates(rank).dp
        assert list(rows.numbers()) == [t for t, owner in enumerate(owners) if owner == replica]


@given(groups_of_microbatches(), st.integers(1, 7), st.integers(1, 2))
def test_replicas_cover_the_microbatch_once_and_in_order(group, dp, tp):
    counts, microbatch = group
    vision = placement_of("vision", tp=tp, dp=dp)

    owned = made_by(vision, group_counts=counts, microbatch=microbatch)

    num_tokens = sum(counts[slice(*microbatch)])
    tokens = [token for ranks in owned.replicas for token in owned.rows[ranks[0]].numbers()]
    assert tokens == list(range(num_tokens))
    assert sorted(rank for ranks in owned.replicas for rank in ranks) == sorted(owned.rows)
    for ranks in owned.replicas:
        assert len({owned.rows[rank] for rank in ranks}) == 1


def test_produced_refuses_microbatch_outside_its_group():
    with pytest.raises(LayoutError, match=r"microbatch=\[2, 4\] must be samples of a group of 3; "):
        made_by(placement_of("vision"), group_counts=[1, 1, 1], microbatch=Interval(2, 4))


def test_produced_refuses_offsets_of_another_number_of_samples():
    with pytest.raises(LayoutError, match=r"offsets=4 must number one more .*microbatch=\[0, 2\]"):
        produced(
            placement_of("vision"),
            offsets=row_offsets([1, 1, 1]),
            microbatch=Interval(0, 2),
            group_size=3,
        )


def test_kept_refuses_another_number_of_samples():
    with pytest.raises(LayoutError, match=r"samples=3 must number .*=2\*2=4; "):
        kept(placement_of("language", dp=2), samples=runs_of([1, 1, 1]), samples_per_replica=2)


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 5)), max_size=8))
def test_rows_are_the_union_of_their_intervals(spans):
    intervals = [Interval(start, start + size) for start, size in spans]

    rows = Rows.of(intervals)

    assert list(rows.numbers()) == sorted({row for each in intervals for row in range(*each)})
    assert all(before.stop < after.start for before, after in pairwise(rows))
    places = Places(rows)
    assert [places.find(row) for row in rows.numbers()] == list(range(rows.size))
    assert places.find(26) is None
