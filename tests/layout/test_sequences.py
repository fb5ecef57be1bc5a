import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mosaic.errors import LayoutError
from megatron_mosaic.layout.attention import AttentionPlan
from megatron_mosaic.layout.ownership import kept
from megatron_mosaic.layout.placement import ModulePlacement
from megatron_mosaic.layout.rows import Interval
from megatron_mosaic.layout.sequences import (
    MaskedSharding,
    SampleSequence,
    sample_assignment,
    sharding_of,
)
from megatron_mosaic.layout.sharding import SequenceSharding

CAUSAL = AttentionPlan(mask="causal", tokens="contiguous")
TEXT = SampleSequence()


@st.composite
def shardings(draw):
    attention = AttentionPlan(
        mask=draw(st.sampled_from(["causal", "prefix_lm", "multimodal_packed"])),
        tokens=draw(st.sampled_from(["contiguous", "zigzag", "lpt", "balanced"])),
    )
    return MaskedSharding(
        attention=attention,
        sequence_length=draw(st.integers(1, 700)),
        cp=draw(st.integers(1, 4)),
        tp=draw(st.integers(1, 3)),
    )


@st.composite
def sequences(draw, length):
    cuts = sorted(draw(st.lists(st.integers(0, length), max_size=8, unique=True)))
    items = tuple(Interval(*pair) for pair in zip(cuts[::2], cuts[1::2], strict=False))
    last = max([1, *(item.stop for item in items)])
    stops = draw(st.sampled_from([None, (last,), (length,)]))
    return SampleSequence(items, stops)


def test_placement_without_a_mask_is_split_in_zigzag():
    language = ModulePlacement(name="language", ranks=(0, 1), context_parallel_size=2)

    assert sharding_of(language, sequence_length=8) == SequenceSharding(sequence_length=8, cp=2)


def test_placement_with_a_mask_is_split_by_it_at_any_length():
    language = ModulePlacement(
        name="language",
        ranks=(0, 1, 2, 3),
        context_parallel_size=2,
        tensor_model_parallel_size=2,
        sequence_parallel=True,
        attention=CAUSAL,
    )

    sharding = sharding_of(language, sequence_length=7)

    assert sharding == MaskedSharding(attention=CAUSAL, sequence_length=7, cp=2, tp=2)


def test_sequence_parallel_parts_are_slots_of_a_context_parallel_rank():
    sharding = MaskedSharding(attention=CAUSAL, sequence_length=7, cp=2, tp=2)

    # Pieces of 3 and 4 tokens: four slots of every context-parallel rank, two of every rank.
    assert sharding.context_length([TEXT]) == 4
    assert sharding.local_length([TEXT]) == 2
    parts = [
        sharding.positions(TEXT, cp=cp, tp=tp, local_length=2) for cp in (0, 1) for tp in (0, 1)
    ]
    assert parts == [((0, 2),), ((2, 3),), ((3, 5),), ((5, 7),)]


def test_slots_are_those_of_the_fullest_rank_of_all_samples():
    attention = AttentionPlan(mask="causal", tokens="lpt")
    sharding = MaskedSharding(attention=attention, sequence_length=300, cp=2)
    samples = [TEXT, SampleSequence(document_stops=(40,))]

    slots = [sharding.local_length([sample]) for sample in samples]

    assert slots[0] != slots[1]
    assert sharding.local_length(samples) == max(slots)


def test_rows_go_to_the_rank_that_the_mask_of_their_sample_names():
    language = ModulePlacement(name="language", ranks=(0, 1), context_parallel_size=2)
    sharding = MaskedSharding(attention=CAUSAL, sequence_length=8, cp=2)
    samples = [(Interval(2, 6),), (Interval(6, 10),)]
    sequences = [SampleSequence(runs) for runs in samples]

    owned = kept(
        language,
        samples=samples,
        samples_per_replica=2,
        sharding=sharding,
        table_of=lambda sample: sharding.table(sequences[sample], local_length=4),
    )

    # Positions 0-3 are on rank 0. Rows at 8 and 9 lie beyond the sequence.
    assert owned.rows == {0: ((0, 2),), 1: ((2, 6),)}


def test_assignment_is_found_once_for_equal_samples():
    attention = AttentionPlan(mask="encoder_embedded")
    first, second = (SampleSequence((Interval(3, 90),), (200,)) for _ in range(2))

    found = sample_assignment(attention, first, length=256, cp=2)

    assert sample_assignment(attention, second, length=256, cp=2) is found
    other = SampleSequence((Interval(4, 90),), (200,))
    assert sample_assignment(attention, other, length=256, cp=2) is not found


def test_sample_that_contradicts_its_mask_is_refused():
    sharding = MaskedSharding(
        attention=AttentionPlan(mask="encoder_prepended"), sequence_length=9, cp=2
    )

    with pytest.raises(LayoutError, match="start=2 of an item must be 0 with mask=encoder_prep"):
        sharding.assignment(SampleSequence((Interval(2, 5),)))


@settings(max_examples=150, deadline=None)
@given(shardings(), st.data())
def test_every_position_is_in_one_slot_of_the_rank_that_its_assignment_names(sharding, data):
    length = sharding.sequence_length
    samples = data.draw(st.lists(sequences(length), min_size=1, max_size=3))

    slots = sharding.local_length(samples)

    for sample in samples:
        assignment = sharding.assignment(sample)
        rank = np.repeat(assignment.owner, assignment.cut.sizes)
        found = {}
        for cp in range(sharding.cp):
            own = np.flatnonzero(rank == cp).tolist()
            for tp in range(sharding.tp):
                part = own[tp * slots : (tp + 1) * slots]
                positions = sharding.positions(sample, cp=cp, tp=tp, local_length=slots)
                assert list(positions.numbers()) == part
                found |= dict.fromkeys(part, (cp, tp))
            assert len(own) <= slots * sharding.tp
        assert sorted(found) == list(range(length))
