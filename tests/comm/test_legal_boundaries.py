"""Random layouts of two and three modules against the computation without any."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings

from megatron_mosaic.comm.boundary import BoundaryChannel
from megatron_mosaic.comm.exchange import Exchange
from megatron_mosaic.comm.groups import GroupFactory
from tests.comm.legal_boundaries import (
    HIDDEN,
    Boundary,
    boundaries,
    drawn,
    pairs_of_boundaries,
)
from tests.comm.simulated import exchange
from tests.ranks import run_ranks

WORLD_SIZE = 8
NUM_ON_RANKS = 100
LAYOUTS = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


def _simulate(boundary, direction, microbatch, held):
    routes = boundary.routes()
    ranks = {*boundary.source.ranks, *boundary.destination.ranks}
    return exchange(
        {rank: routes.route(direction, microbatch, rank=rank) for rank in ranks},
        {rank: held.get(rank, np.zeros((0, HIDDEN))) for rank in ranks},
        hidden=HIDDEN,
    )


def _forward(boundary, microbatch, rows):
    makers = boundary.source.stage_ranks(boundary.source.pipeline_model_parallel_size - 1)
    return _simulate(
        boundary,
        "activation",
        microbatch,
        {rank: rows[boundary.made_by(rank)[microbatch]] for rank in makers},
    )


@settings(LAYOUTS, max_examples=400)
@given(boundaries())
def test_boundary_of_any_two_layouts_is_that_of_one_process(boundary):
    rows, gradients = boundary.inputs(), boundary.row_gradients()

    for microbatch in boundary.microbatches:
        received = _forward(boundary, microbatch, rows)
        leaving = {}
        for rank in boundary.destination.stage_ranks(0):
            numbers = boundary.kept_by(rank)[microbatch]
            np.testing.assert_array_equal(received[rank], rows[numbers])
            leaving[rank] = gradients[numbers] * boundary.own_part(rank, numbers)
        arrived = _simulate(boundary, "gradient", microbatch, leaving)
        for rank in boundary.source.ranks:
            numbers = boundary.made_by(rank)[microbatch]
            if numbers:
                np.testing.assert_allclose(arrived[rank], gradients[numbers])


@settings(LAYOUTS, max_examples=120)
@given(pairs_of_boundaries())
def test_boundaries_of_any_three_layouts_are_those_of_one_process(pair):
    first, last = pair
    for boundary in pair:
        rows = boundary.inputs()
        for microbatch in boundary.microbatches:
            received = _forward(boundary, microbatch, rows)
            for rank in boundary.destination.stage_ranks(0):
                numbers = boundary.kept_by(rank)[microbatch]
                np.testing.assert_array_equal(received[rank], rows[numbers])
    if first.destination == last.source:
        _check_chain(first, last)


def _check_chain(first, last):
    """The middle squares its rows; gradients come back through both boundaries."""
    rows = first.inputs()
    onward = last.row_gradients() / np.maximum(np.abs(last.inputs()), 1e-30)
    onward = onward * np.sign(last.inputs()) * rows**2  # 2 * number * square, where it is kept
    expected = onward * 2 * rows
    middle = first.destination
    for microbatch in first.microbatches:
        received = _forward(first, microbatch, rows)
        stage = middle.pipeline_model_parallel_size - 1
        pipeline = dict(zip(middle.stage_ranks(0), middle.stage_ranks(stage), strict=True))
        squares = {pipeline[rank]: received[rank] ** 2 for rank in pipeline}
        kept = _simulate(last, "activation", microbatch, squares)
        leaving = {}
        for rank in last.destination.stage_ranks(0):
            numbers = last.kept_by(rank)[microbatch]
            np.testing.assert_allclose(kept[rank], rows[numbers] ** 2)
            leaving[rank] = onward[numbers]
        back = _simulate(last, "gradient", microbatch, leaving)
        arriving = {rank: back[pipeline[rank]] * 2 * received[rank] for rank in pipeline}
        arrived = _simulate(first, "gradient", microbatch, arriving)
        for rank in first.source.ranks:
            numbers = first.made_by(rank)[microbatch]
            if numbers:
                np.testing.assert_allclose(arrived[rank], expected[numbers])


@pytest.fixture(scope="module")
def on_ranks():
    layouts = drawn(boundaries(max_world_size=WORLD_SIZE), NUM_ON_RANKS, seed=7)
    layouts += [
        boundary
        for pair in drawn(pairs_of_boundaries(max_world_size=WORLD_SIZE), 8, seed=7)
        for boundary in pair
    ]
    return layouts, run_ranks(_run_all, WORLD_SIZE, layouts)


def test_ranks_receive_what_they_keep_under_any_two_layouts(on_ranks):
    layouts, outcomes = on_ranks

    for index, boundary in enumerate(layouts):
        rows = boundary.inputs()
        for rank in boundary.destination.stage_ranks(0):
            for microbatch, numbers in enumerate(boundary.kept_by(rank)):
                received = outcomes[rank][index]["received"][microbatch]
                np.testing.assert_array_equal(received, rows[numbers])


def test_ranks_receive_the_gradients_of_what_they_made_under_any_two_layouts(on_ranks):
    layouts, outcomes = on_ranks

    for index, boundary in enumerate(layouts):
        gradients = boundary.row_gradients()
        stage = boundary.source.pipeline_model_parallel_size - 1
        for rank in boundary.source.stage_ranks(stage):
            for microbatch, numbers in enumerate(boundary.made_by(rank)):
                arrived = outcomes[rank][index]["gradients"][microbatch]
                np.testing.assert_allclose(arrived, gradients[numbers])


def _run_all(rank: int, layouts: list[Boundary]) -> list[dict]:
    factory = GroupFactory(rank)
    return [_run(boundary, rank, factory) for boundary in layouts]


def _run(boundary: Boundary, rank: int, factory: GroupFactory) -> dict:
    rows = torch.from_numpy(boundary.inputs())
    routes = boundary.routes()
    received: list[torch.Tensor] = []
    made = boundary.made_by(rank)
    channel = _channel("activation", boundary, routes, rank, factory)
    for group in boundary.groups:
        numbers = [row for microbatch in group for row in made[microbatch]]
        makes = rank in boundary.source.stage_ranks(
            boundary.source.pipeline_model_parallel_size - 1
        )
        parts = channel.split(rows[numbers] if makes else None, group)
        received += _exchange(channel, zip(group, parts, strict=True))
    gradients = torch.from_numpy(boundary.row_gradients())
    leaving = []
    for microbatch, numbers in enumerate(boundary.kept_by(rank)):
        if rank in boundary.destination.stage_ranks(0):
            own = torch.from_numpy(boundary.own_part(rank, numbers))
            leaving.append((microbatch, gradients[numbers] * own))
        else:
            leaving.append((microbatch, None))
    channel = _channel("gradient", boundary, routes, rank, factory)
    arrived = _exchange(channel, leaving)
    return {
        "received": [part.numpy() for part in received],
        "gradients": [part.numpy() for part in arrived],
    }


def _channel(direction, boundary, routes, rank, factory):
    receiver = boundary.destination if direction == "activation" else boundary.source
    replicas = [
        factory.group(sorted(ranks), scope="replicas")
        for ranks in receiver.groups("tp")
        if len(ranks) > 1
    ]
    group = factory.group(range(WORLD_SIZE), scope=direction)
    assert group is not None
    exchange = Exchange(
        group=group,
        gather_group=next((group for group in replicas if group is not None), None),
        hidden_size=HIDDEN,
        dtype=torch.float64,
        device=torch.device("cpu"),
    )
    return BoundaryChannel(direction, routes, exchange, rank=rank)


def _exchange(channel, leaving) -> list[torch.Tensor]:
    """Posts all microbatches, then takes what arrives."""
    pendings = [channel.post(microbatch, rows) for microbatch, rows in leaving]
    received = [pending.wait() for pending in pendings]
    for pending in pendings:
        pending.finish()
    return received
