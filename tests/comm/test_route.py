from collections import Counter
from collections.abc import Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mosaic.comm.route import Gather, Leg, Route, gradient_route, route
from megatron_mosaic.errors import LayoutError
from megatron_mosaic.layout.ownership import Ownership, kept, produced, row_offsets
from megatron_mosaic.layout.placement import ModulePlacement
from megatron_mosaic.layout.rows import Interval, Places, Rows
from megatron_mosaic.layout.sharding import SequenceSharding


def _vision(*ranks, **sizes):
    return ModulePlacement(name="vision", ranks=ranks, **sizes)


def _language(*ranks, **sizes):
    return ModulePlacement(name="language", ranks=ranks, **sizes)


def _owners(source, destination, counts):
    samples_per_replica = len(counts) // destination.data_parallel_size
    return (
        _produced(source, counts, Interval(0, len(counts))),
        kept(destination, samples=_runs(counts), samples_per_replica=samples_per_replica),
    )


def _produced(source, group_counts, microbatch):
    return produced(
        source,
        offsets=row_offsets(group_counts[slice(*microbatch)]),
        microbatch=microbatch,
        group_size=len(group_counts),
    )


def _runs(counts):
    return [(Interval(0, count),) for count in counts]


def _parts(destination, num_rows):
    """A destination whose context-parallel ranks all keep all rows: each has a part."""
    rows = Rows([Interval(0, num_rows)])
    sets = destination.groups("tp")
    return Ownership(rows={rank: rows for each in sets for rank in each}, replicas=tuple(sets))


def test_route_spreads_over_replicas_of_the_source():
    owners = _owners(_vision(0, 1, tensor_model_parallel_size=2), _language(2), [10])

    # Each of the two replicas sends half of the ten rows.
    assert route(*owners).legs == (Leg(0, 2, Interval(0, 5)), Leg(1, 2, Interval(5, 10)))


def test_route_gives_replicas_of_the_destination_shares_to_gather():
    owners = _owners(_vision(0), _language(1, 2, tensor_model_parallel_size=2), [5])

    planned = route(*owners)

    # Shares of ceil(5 / 2) = 3 rows: the second has the 2 that are left.
    assert planned.legs == (Leg(0, 1, Interval(0, 3)), Leg(0, 2, Interval(3, 5)))
    assert planned.gathers == (Gather(ranks=(1, 2), rows=Rows([Interval(0, 5)])),)
    assert planned.gathers[0].share_size == 3


def test_route_moves_nothing_between_equal_layouts():
    sizes = {"tensor_model_parallel_size": 2, "data_parallel_size": 2}
    owners = _owners(_vision(0, 1, 2, 3, **sizes), _language(0, 1, 2, 3, **sizes), [4, 3])

    for planned in (route(*owners), gradient_route(*owners)):
        assert all(leg.source == leg.destination for leg in planned.legs)
        assert planned.gathers == ()


def test_route_takes_rows_from_a_replica_that_has_them():
    source = _vision(0, 1, data_parallel_size=2)
    owners = _owners(source, _language(0, 1, tensor_model_parallel_size=2), [4, 3])

    planned = route(*owners)

    # The four rows of the first sample are on rank 0, the three of the second on rank 1.
    assert set(planned.legs) == {
        Leg(0, 0, Interval(0, 4)),
        Leg(0, 1, Interval(0, 4)),
        Leg(1, 1, Interval(4, 7)),
        Leg(1, 0, Interval(4, 7)),
    }
    assert planned.gathers == ()


def test_route_takes_rows_from_a_replica_rather_than_from_elsewhere():
    source = _vision(0, 1, tensor_model_parallel_size=2)
    owners = _owners(source, _language(1, 2, tensor_model_parallel_size=2), [4])

    # Rank 1 is in the tensor-parallel group of rank 2; rank 0 has the rows, too, but is not.
    assert set(route(*owners).legs) == {Leg(1, 1, Interval(0, 4)), Leg(1, 2, Interval(0, 4))}


def test_route_prefers_a_source_on_the_same_node():
    source = _vision(0, 4, tensor_model_parallel_size=2)
    owners = _owners(source, _language(1, 5, data_parallel_size=2), [6, 6])

    planned = route(*owners, node_of=lambda rank: rank // 4)

    assert planned.legs == (Leg(0, 1, Interval(0, 6)), Leg(4, 5, Interval(6, 12)))


def test_route_balances_the_load_of_the_sources():
    source = _vision(0, 1, tensor_model_parallel_size=2)
    destination = _language(2, 3, 4, 5, tensor_model_parallel_size=2, data_parallel_size=2)

    planned = route(*_owners(source, destination, [8, 8]))

    # 16 rows, each sent once, over two sources.
    assert _sent_rows(planned) == {0: 8, 1: 8}


def test_gradient_route_reaches_every_replica_of_the_source():
    owners = _owners(_vision(0, 1, tensor_model_parallel_size=2), _language(2), [10])

    planned = gradient_route(*owners)

    # Rank 2 sends each half once; the replicas gather the other half from each other.
    assert planned.legs == (Leg(2, 0, Interval(0, 5)), Leg(2, 1, Interval(5, 10)))
    assert planned.gathers == (Gather(ranks=(0, 1), rows=Rows([Interval(0, 10)])),)


def test_gradient_route_sends_from_one_replica_of_the_destination():
    owners = _owners(_vision(0), _language(1, 2, tensor_model_parallel_size=2), [10])

    # Both replicas have the whole gradient: each sends half of it.
    assert gradient_route(*owners).legs == (Leg(1, 0, Interval(0, 5)), Leg(2, 0, Interval(5, 10)))


def test_gradient_route_brings_the_part_of_every_context_parallel_rank():
    source, _ = _owners(_vision(0), _language(1), [10])
    owners = source, _parts(_language(1, 2, context_parallel_size=2), 10)

    assert gradient_route(*owners).legs == (Leg(1, 0, Interval(0, 10)), Leg(2, 0, Interval(0, 10)))


def test_gradient_route_adds_up_parts_where_their_sum_is_gathered():
    source = _vision(0, 1, tensor_model_parallel_size=2)
    made, _ = _owners(source, _language(0), [4])
    owners = made, _parts(_language(0, 1, context_parallel_size=2), 4)

    planned = gradient_route(*owners)

    # Each rank takes half of the other's part, adds its own, and gathers the other half's sum.
    assert set(planned.legs) == {
        Leg(0, 0, Interval(0, 2)),
        Leg(1, 0, Interval(0, 2)),
        Leg(0, 1, Interval(2, 4)),
        Leg(1, 1, Interval(2, 4)),
    }
    assert planned.gathers == (Gather(ranks=(0, 1), rows=Rows([Interval(0, 4)])),)


def test_route_of_no_rows_is_empty():
    owners = _owners(_vision(0), _language(1, 2, data_parallel_size=2), [0, 0])

    assert route(*owners).legs == ()
    assert gradient_route(*owners).legs == ()


def test_route_rejects_rows_that_nobody_produces():
    source = Ownership(rows={0: Rows([Interval(0, 3)])}, replicas=((0,),))
    destination = Ownership(rows={1: Rows([Interval(2, 5)])}, replicas=((1,),))

    with pytest.raises(LayoutError, match=r"rows=\[2, 5\] kept by rank 1 .* \[\[0, 3\]\]"):
        route(source, destination)


@st.composite
def _ownerships(draw, max_context_parallel_size=2):
    mbs = draw(st.integers(1, 3))
    source_sizes = draw(st.tuples(st.integers(1, 3), st.integers(1, 4)))  # tp, dp
    tp, cp, dp = st.integers(1, 3), st.integers(1, max_context_parallel_size), st.integers(1, 3)
    sizes = draw(st.tuples(tp, cp, dp))
    world = st.permutations(range(18))
    source = _vision(
        *draw(world)[: source_sizes[0] * source_sizes[1]],
        tensor_model_parallel_size=source_sizes[0],
        data_parallel_size=source_sizes[1],
    )
    destination = _language(
        *draw(world)[: sizes[0] * sizes[1] * sizes[2]],
        tensor_model_parallel_size=sizes[0],
        context_parallel_size=sizes[1],
        data_parallel_size=sizes[2],
    )
    num_samples = mbs * sizes[2]
    num_microbatches = draw(st.integers(1, 3))
    num_counts = num_samples * num_microbatches
    counts = draw(st.lists(st.integers(0, 5), min_size=num_counts, max_size=num_counts))
    first = num_samples * draw(st.integers(0, num_microbatches - 1))
    microbatch = Interval(first, first + num_samples)
    return (
        _produced(source, counts, microbatch),
        _kept(draw, destination, counts[first:][:num_samples], mbs),
    )


def _kept(draw, destination, counts, mbs):
    """Whole sequences on every rank, in parts where there is context parallelism, or their sum."""
    cp = destination.context_parallel_size
    if cp == 1:
        return kept(destination, samples=_runs(counts), samples_per_replica=mbs)
    if draw(st.booleans()):
        sharding = SequenceSharding(sequence_length=4 * cp, cp=cp)
        gaps = [draw(st.integers(0, 4 * cp - count)) for count in counts]
        samples = [(Interval(gap, gap + count),) for gap, count in zip(gaps, counts, strict=True)]
        return kept(destination, samples=samples, samples_per_replica=mbs, sharding=sharding)
    return kept(destination, samples=_runs(counts), samples_per_replica=mbs)


@settings(max_examples=150, deadline=None)
@given(_ownerships())
def test_route_delivers_every_kept_row_once(owners):
    source, destination = owners

    arrived = _deliver(route(*owners), parts=[source.rows])

    for rank, rows in destination.rows.items():
        assert arrived[rank] == Counter((0, row) for row in rows.numbers())


@settings(max_examples=150, deadline=None)
@given(_ownerships())
def test_gradient_route_delivers_every_part_once_to_every_replica(owners):
    source, destination = owners
    parts = [
        {rank: destination.rows[rank] for rank in sorted(replicas)}
        for replicas in sorted(tuple(sorted(replicas)) for replicas in destination.replicas)
    ]

    arrived = _deliver(gradient_route(*owners), parts=parts)

    for rank, rows in source.rows.items():
        assert arrived[rank] == Counter(
            (index, row)
            for index, part in enumerate(parts)
            for row in rows.numbers()
            if row in set(next(iter(part.values())).numbers())
        )


@settings(max_examples=150, deadline=None)
@given(_ownerships())
def test_route_brings_a_rank_only_the_rows_that_it_lacks(owners):
    source, destination = owners

    received = _received_rows(route(*owners))

    for rank, rows in destination.rows.items():
        held = set(source.rows.get(rank, Rows()).numbers())
        assert received[rank] == sum(row not in held for row in rows.numbers())


@settings(max_examples=150, deadline=None)
@given(_ownerships(max_context_parallel_size=1))
def test_gradient_route_brings_a_rank_only_the_rows_that_it_lacks(owners):
    source, destination = owners

    received = _received_rows(gradient_route(*owners))

    kept_rows = {row for rows in destination.rows.values() for row in rows.numbers()}
    for rank, rows in source.rows.items():
        held = set(destination.rows.get(rank, Rows()).numbers())
        assert received[rank] == sum(row in kept_rows and row not in held for row in rows.numbers())


@settings(max_examples=150, deadline=None)
@given(_ownerships())
def test_gradient_route_never_brings_a_rank_the_part_that_it_has(owners):
    replicas_of = {rank: replicas for replicas in owners[1].replicas for rank in replicas}

    for leg in gradient_route(*owners).legs:
        assert leg.source == leg.destination or leg.destination not in replicas_of[leg.source]


@settings(max_examples=100, deadline=None)
@given(_ownerships(), st.randoms(use_true_random=False))
def test_route_does_not_depend_on_the_order_of_its_inputs(owners, random):
    shuffled = [
        Ownership(
            rows=dict(random.sample(list(owner.rows.items()), len(owner.rows))),
            replicas=tuple(random.sample(owner.replicas, len(owner.replicas))),
        )
        for owner in owners
    ]

    assert route(*owners) == route(*shuffled)
    assert gradient_route(*owners) == gradient_route(*shuffled)


def _deliver(planned: Route, *, parts: list[Mapping[int, Rows]]) -> dict[int, Counter]:
    """Every (part, row) that a rank has in the end, with how many times it came."""
    whole: dict[int, Counter] = {rank: Counter() for rank in planned.wanted}
    shares: dict[int, Counter] = {rank: Counter() for rank in planned.wanted}
    for leg in planned.legs:
        for row in range(*leg.interval):
            index = next(  # the part that the source has of this row
                index
                for index, part in enumerate(parts)
                if leg.source in part and row in set(part[leg.source].numbers())
            )
            gather = planned.gather_of(leg.destination)
            shared = gather is not None and Places(gather.rows).find(row) is not None
            (shares if shared else whole)[leg.destination][index, row] += 1
    for gather in planned.gathers:
        gathered = sum((shares[rank] for rank in gather.ranks), Counter())
        for position, rank in enumerate(gather.ranks):
            own = range(*gather.share(position))
            assert all(Places(gather.rows).find(row) in own for _, row in shares[rank])
            whole[rank] += gathered
    return whole


def _sent_rows(planned: Route) -> Counter:
    sent = Counter()
    for leg in planned.legs:
        if leg.source != leg.destination:
            sent[leg.source] += leg.interval.size
    return sent


def _received_rows(planned: Route) -> Counter:
    received = Counter()
    for leg in planned.legs:
        if leg.source != leg.destination:
            received[leg.destination] += leg.interval.size
    for gather in planned.gathers:
        for position, rank in enumerate(gather.ranks):
            received[rank] += gather.rows.size - gather.share(position).size
    return received
