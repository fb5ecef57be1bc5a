"""Carries out routes on arrays in one process, message by message, as ranks would."""

from collections.abc import Mapping

import numpy as np

from megatron_mosaic.comm.route import Gather, Leg, Route
from megatron_mosaic.layout.rows import Interval, Places, Rows


def exchange(
    routes: Mapping[int, Route], held: Mapping[int, np.ndarray], *, hidden: int
) -> dict[int, np.ndarray]:
    """Moves rows along the routes that every rank has derived by itself.

    Args:
        routes: Of every rank, its own.
        held: Rows of every rank ``[rows, h]``.
        hidden: Width of a row.

    Returns:
        The rows that every rank has in the end.
    """
    messages: dict[tuple[int, int], np.ndarray] = {}
    for rank, route in routes.items():
        assert len(held[rank]) == route.held.get(rank, Rows()).size
        for peer, legs in _by_peer(route, sender=rank).items():
            places = Places(route.held[rank])
            parts = [held[rank][places.slice(leg.interval)] for leg in legs]
            messages[rank, peer] = np.concatenate(parts)
    arrived = {
        rank: list(_unpack(messages, route, rank=rank)) for rank, route in sorted(routes.items())
    }
    assert not messages, f"nobody expects the messages {sorted(messages)}"
    shares = {
        rank: _share(gather, rank, arrived[rank], hidden=hidden)
        for rank, route in routes.items()
        if (gather := route.gather_of(rank)) is not None
    }
    return {
        rank: _sum(
            [*arrived[rank], *_gathered(routes, shares, rank)],
            over=route.wanted.get(rank, Rows()),
            hidden=hidden,
        )
        for rank, route in routes.items()
    }


def _by_peer(
    route: Route, *, sender: int | None = None, receiver: int | None = None
) -> dict[int, list[Leg]]:
    found: dict[int, list[Leg]] = {}
    for leg in route.legs:
        if leg.source == sender:
            found.setdefault(leg.destination, []).append(leg)
        elif leg.destination == receiver:
            found.setdefault(leg.source, []).append(leg)
    return found


def _unpack(messages, route, *, rank):
    incoming = _by_peer(route, receiver=rank)
    if own := [leg for leg in route.legs if leg.source == leg.destination == rank]:
        incoming[rank] = own
    for peer, legs in incoming.items():
        message, first = messages.pop((peer, rank)), 0
        for leg in legs:
            yield leg.interval, message[first : first + leg.interval.size]
            first += leg.interval.size
        assert first == len(message), f"{peer} and {rank} must agree on their message"


def _share(gather: Gather, rank: int, arrived: list, *, hidden: int) -> np.ndarray:
    """Takes the rows to be gathered out of what has arrived, and returns them added up."""
    share = gather.share(gather.ranks.index(rank))
    total = np.zeros((gather.share_size, hidden))
    places = Places(gather.rows)
    for part in list(arrived):
        interval, values = part
        first = places.find(interval.start)
        if first is not None:
            assert share.start <= first
            assert first + interval.size <= share.stop
            total[first - share.start : first - share.start + interval.size] += values
            arrived[:] = [other for other in arrived if other is not part]
    return total


def _gathered(routes, shares, rank):
    gather = routes[rank].gather_of(rank)
    if gather is None:
        return
    assert all(routes[peer].gather_of(peer) == gather for peer in gather.ranks)
    whole, first = np.concatenate([shares[peer] for peer in gather.ranks]), 0
    for interval in gather.rows:
        yield interval, whole[first : first + interval.size]
        first += interval.size


def _sum(parts: list[tuple[Interval, np.ndarray]], *, over: Rows, hidden: int) -> np.ndarray:
    total, places = np.zeros((over.size, hidden)), Places(over)
    for interval, values in parts:
        total[places.slice(interval)] += values
    return total
