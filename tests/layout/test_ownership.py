import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_mosaic.errors import LayoutError
from megatron_mosaic.layout.ownership import (
    Interval,
    encoder_samples,
    kept,
    language_samples,
    produced,
    split_evenly,
    token_offsets,
)
from megatron_mosaic.layout.placement import ModulePlacement

COUNTS = st.integers(0, 3)


def placement_of(name, *, tp=1, cp=1, dp=1, pp=1):
    return ModulePlacement(
        name=name,
        ranks=tuple(range(tp * cp * dp * pp)),
        tensor_model_parallel_size=tp,
        context_parallel_size=cp,
        data_parallel_size=dp,
        pipeline_model_parallel_size=pp,
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


def test_token_offsets_end_with_the_total():
    assert token_offsets([3, 0, 2]) == [0, 3, 3, 5]


def test_produced_clips_the_group_to_the_microbatch():
    vision = placement_of("vision", dp=2)

    # Six samples, three for each replica; the microbatch is samples 2 and 3, of 2 and 5 tokens.
    owned = produced(vision, group_counts=[3, 0, 2, 5, 1, 1], microbatch=Interval(2, 4))

    assert owned.intervals == {0: (0, 2), 1: (2, 7)}


def test_produced_is_empty_on_replicas_outside_the_microbatch():
    vision = placement_of("vision", dp=4)

    owned = produced(vision, group_counts=[3, 1, 2, 5], microbatch=Interval(2, 4))

    assert owned.intervals == {0: (0, 0), 1: (0, 0), 2: (0, 2), 3: (2, 7)}


def test_produced_belongs_to_last_stage_and_its_tensor_parallel_replicas():
    vision = placement_of("vision", tp=2, dp=2, pp=2)

    owned = produced(vision, group_counts=[1, 4], microbatch=Interval(0, 2))

    assert owned.intervals == {4: (0, 1), 5: (0, 1), 6: (1, 5), 7: (1, 5)}
    assert owned.replicas == ((4, 5), (6, 7))


def test_kept_belongs_to_first_stage_and_its_tensor_parallel_replicas():
    language = placement_of("language", tp=2, dp=2, pp=2)

    owned = kept(language, counts=[1, 4, 0, 2], samples_per_replica=2)

    assert owned.intervals == {0: (0, 5), 1: (0, 5), 2: (5, 7), 3: (5, 7)}
    assert owned.replicas == ((0, 1), (2, 3))


def test_kept_gradients_of_context_parallel_ranks_are_parts():
    language = placement_of("language", tp=2, cp=2)

    owned = kept(language, counts=[4], samples_per_replica=1)

    assert set(owned.intervals.values()) == {(0, 4)}
    assert owned.replicas == ((0, 1), (2, 3))


@given(groups_of_microbatches(), st.integers(1, 7), st.integers(1, 2), st.integers(1, 2))
def test_produced_equals_ownership_token_by_token(group, dp, tp, pp):
    counts, microbatch = group
    vision = placement_of("vision", tp=tp, dp=dp, pp=pp)

    owned = produced(vision, group_counts=counts, microbatch=microbatch)

    # Every token of the microbatch in order, as the data-parallel rank that runs its sample.
    runs = {}
    for replica, samples in enumerate(encoder_samples(len(counts), data_parallel_size=dp)):
        runs |= dict.fromkeys(range(*samples), replica)
    owners = [runs[sample] for sample in range(*microbatch) for _ in range(counts[sample])]
    assert set(owned.intervals) == set(vision.stage_ranks(pp - 1))
    for rank, interval in owned.intervals.items():
        replica = vision.coordinates(rank).dp
        assert list(range(*interval)) == [t for t, owner in enumerate(owners) if owner == replica]


@given(st.integers(1, 5), st.integers(1, 3), st.integers(1, 2), st.data())
def test_kept_equals_ownership_token_by_token(dp, samples, tp, data):
    counts = data.draw(st.lists(COUNTS, min_size=dp * samples, max_size=dp * samples))
    language = placement_of("language", tp=tp, dp=dp, pp=2)

    owned = kept(language, counts=counts, samples_per_replica=samples)

    owners = [sample // samples for sample, count in enumerate(counts) for _ in range(count)]
    assert set(owned.intervals) == set(language.stage_ranks(0))
    for rank, interval in owned.intervals.items():
        replica = language.coordinates(rank).dp
        assert list(range(*interval)) == [t for t, owner in enumerate(owners) if owner == replica]


@given(groups_of_microbatches(), st.integers(1, 7), st.integers(1, 2))
def test_replicas_cover_the_microbatch_once_and_in_order(group, dp, tp):
    counts, microbatch = group
    vision = placement_of("vision", tp=tp, dp=dp)

    owned = produced(vision, group_counts=counts, microbatch=microbatch)

    num_tokens = sum(counts[slice(*microbatch)])
    tokens = [token for ranks in owned.replicas for token in range(*owned.intervals[ranks[0]])]
    assert tokens == list(range(num_tokens))
    assert sorted(rank for ranks in owned.replicas for rank in ranks) == sorted(owned.intervals)
    for ranks in owned.replicas:
        assert len({owned.intervals[rank] for rank in ranks}) == 1


def test_produced_refuses_microbatch_outside_its_group():
    with pytest.raises(LayoutError, match=r"microbatch=\[2, 4\] must be samples of a group of 3; "):
        produced(placement_of("vision"), group_counts=[1, 1, 1], microbatch=Interval(2, 4))


def test_kept_refuses_counts_of_other_number_of_samples():
    with pytest.raises(LayoutError, match=r"token counts=3 must number .*=2\*2=4; "):
        kept(placement_of("language", dp=2), counts=[1, 1, 1], samples_per_replica=2)
