from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mosaic.comm.boundary import BoundaryRoutes, BoundaryShape, ItemShape
from megatron_mosaic.comm.rank_route import BoundarySides, Microbatch
from megatron_mosaic.comm.route import Leg, gradient_route, route
from megatron_mosaic.layout.dealt import DealtItems
from megatron_mosaic.layout.ownership import row_offsets
from megatron_mosaic.layout.placement import ModulePlacement
from megatron_mosaic.layout.rows import Interval, Rows
from tests.comm.legal_boundaries import boundaries

DIRECTIONS = st.sampled_from(["activation", "gradient"])


# Ranks of a node; None is one node for all.
NODE_SIZES = st.sampled_from([None, 1, 2, 3, 4])


def _sides(boundary, *, node_of=None):
    return BoundarySides(
        source=boundary.source,
        destination=boundary.destination,
        samples_per_replica=boundary.shape.samples_per_replica,
        sharding=boundary.shape.sharding,
        item_rows=boundary.shape.item.rows,
        item_shards=boundary.shape.item.shards,
        node_of=node_of,
    )


def _microbatches(boundary):
    size = boundary.num_samples
    for group in boundary.groups:
        for index, microbatch in enumerate(group):
            own = slice(microbatch * size, (microbatch + 1) * size)
            offsets, dealt = row_offsets(boundary.counts()[own]), None
            if boundary.owners:
                owners = boundary.owners[group][index * size : (index + 1) * size]
                dealt = DealtItems.of(owners, boundary.samples[own])
            yield Microbatch(
                samples=boundary.samples[own],
                offsets=offsets,
                first=index * size,
                group_size=len(group) * size,
                dealt=dealt,
                sequences=boundary.sequences[own] or None,
            )


def _by_pair(legs, rank):
    """Legs that begin or end at a rank, in order, by their two ends."""
    found = {}
    for leg in legs:
        if rank in (leg.source, leg.destination):
            found.setdefault((leg.source, leg.destination), []).append(leg.interval)
    return found


@settings(max_examples=300, deadline=None)
@given(boundaries(max_world_size=12), DIRECTIONS, NODE_SIZES)
def test_part_of_a_rank_is_that_of_the_whole_route(boundary, direction, node_size):
    node_of = None if node_size is None else lambda rank: rank // node_size
    sides = _sides(boundary, node_of=node_of)
    find = route if direction == "activation" else gradient_route

    for microbatch in _microbatches(boundary):
        whole = find(sides.produced(microbatch), sides.kept(microbatch), node_of=node_of)
        for rank in {*boundary.source.ranks, *boundary.destination.ranks}:
            part = sides.route(direction, microbatch, rank=rank)

            assert _by_pair(part.legs, rank) == _by_pair(whole.legs, rank)
            assert len(part.legs) == sum(map(len, _by_pair(part.legs, rank).values()))
            assert part.gather_of(rank) == whole.gather_of(rank)
            assert part.held.get(rank, Rows()) == whole.held.get(rank, Rows())
            assert part.wanted.get(rank, Rows()) == whole.wanted.get(rank, Rows())


@settings(max_examples=100, deadline=None)
@given(boundaries())
def test_rows_that_a_rank_makes_are_counted_row_by_row(boundary):
    routes = boundary.routes()

    for rank in boundary.source.stage_ranks(boundary.source.pipeline_model_parallel_size - 1):
        made = boundary.made_by(rank)
        sizes = [routes.rows_made(microbatch, rank=rank) for microbatch in boundary.microbatches]
        assert sizes == [len(rows) for rows in made]


def test_items_that_are_dealt_are_counted_where_they_are_made():
    vision = ModulePlacement(name="vision", ranks=(0, 1), data_parallel_size=2)
    language = ModulePlacement(name="language", ranks=(2,))
    shape = BoundaryShape(samples_per_replica=1, item=ItemShape(rows=2))
    routes = BoundaryRoutes(vision, language, shape=shape)
    # Samples of three, no and one image, each a microbatch; tasks of one and of two of them.
    samples = ((Interval(0, 6),), (), (Interval(0, 2),))
    owners = {(0,): ((1, 0, 1),), (1, 2): ((), (1,))}
    routes.begin(samples, groups=[(0,), (1, 2)], owners=owners)

    assert [routes.items_made(0, dp=dp) for dp in range(2)] == [1, 2]
    assert [routes.items_made(2, dp=dp) for dp in range(2)] == [0, 1]
    # Rows 0-1 and 4-5 come from the second replica, 2-3 from the first.
    assert routes.route("activation", 0, rank=2).legs == (
        Leg(1, 2, Interval(0, 2)),
        Leg(0, 2, Interval(2, 4)),
        Leg(1, 2, Interval(4, 6)),
    )
    assert routes.route("gradient", 0, rank=1).wanted == {1: Rows([(0, 2), (4, 6)])}


def test_items_of_unlike_sizes_are_the_runs_of_a_sample():
    vision = ModulePlacement(name="vision", ranks=(0, 1), data_parallel_size=2)
    language = ModulePlacement(name="language", ranks=(2,))
    routes = BoundaryRoutes(vision, language, shape=BoundaryShape(samples_per_replica=1))
    # An image of five rows and one of two, with text in between.
    sample = (Interval(0, 5), Interval(7, 9))

    routes.begin((sample,), groups=[(0,)], owners={(0,): ((1, 0),)})
    assert [routes.rows_made(0, rank=rank) for rank in (0, 1)] == [2, 5]

    # The same number of rows, of other items: another route.
    routes.begin(((Interval(0, 3), Interval(3, 7)),), groups=[(0,)], owners={(0,): ((1, 0),)})
    assert routes.route("activation", 0, rank=0).legs == (Leg(0, 2, Interval(3, 7)),)


def test_route_of_a_rank_without_a_part_is_empty():
    vision = ModulePlacement(name="vision", ranks=(0,))
    language = ModulePlacement(name="language", ranks=(1, 2), pipeline_model_parallel_size=2)
    routes = BoundaryRoutes(vision, language, shape=BoundaryShape(samples_per_replica=1))
    routes.begin(((Interval(0, 4),),), groups=[(0,)])

    # Rank 2 hosts the second stage, which has no part in the boundary.
    assert routes.route("activation", 0, rank=2).legs == ()
    assert routes.route("gradient", 0, rank=2).wanted == {}


def test_routes_are_derived_once_for_microbatches_with_equal_rows():
    vision = ModulePlacement(name="vision", ranks=(0,))
    language = ModulePlacement(name="language", ranks=(1,))
    routes = BoundaryRoutes(vision, language, shape=BoundaryShape(samples_per_replica=1))
    # Where the rows belong does not matter to a rank that keeps whole sequences.
    samples = ((Interval(0, 4),), (Interval(2, 6),), (Interval(0, 3),))
    routes.begin(samples, groups=[(0,), (1,), (2,)])

    first, second, third = (routes.route("activation", m, rank=0) for m in range(3))

    assert first is second
    assert third is not first
    routes.begin(samples[::-1], groups=[(0,), (1,), (2,)])
    assert routes.route("activation", 0, rank=0) is third


def test_routes_differ_where_the_source_runs_other_groups():
    vision = ModulePlacement(name="vision", ranks=(0, 1), data_parallel_size=2)
    language = ModulePlacement(name="language", ranks=(2,))
    routes = BoundaryRoutes(vision, language, shape=BoundaryShape(samples_per_replica=2))
    samples = ((Interval(0, 4),),) * 4

    routes.begin(samples, groups=[(0,), (1,)])
    alone = routes.route("activation", 0, rank=2)
    routes.begin(samples, groups=[(0, 1)])
    together = routes.route("activation", 0, rank=2)

    # Alone, each replica runs one of the two samples; in a group of four the first runs both.
    assert [leg.source for leg in alone.legs] == [0, 1]
    assert [leg.source for leg in together.legs] == [0]


def test_routes_take_rows_from_the_node_of_the_rank_that_keeps_them():
    vision = ModulePlacement(name="vision", ranks=(0, 4), tensor_model_parallel_size=2)
    language = ModulePlacement(name="language", ranks=(1, 5), data_parallel_size=2)
    routes = BoundaryRoutes(
        vision, language, shape=BoundaryShape(samples_per_replica=1), node_of=lambda rank: rank // 4
    )
    routes.begin(((Interval(0, 6),), (Interval(0, 6),)), groups=[(0,)])

    # Both replicas of the source have all rows: nothing crosses the two nodes of four ranks.
    assert routes.route("activation", 0, rank=1).legs == (Leg(0, 1, Interval(0, 6)),)
    assert routes.route("activation", 0, rank=5).legs == (Leg(4, 5, Interval(6, 12)),)
