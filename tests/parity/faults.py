"""Planted errors: the comparison must see each of them."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any


def plant(fault: str, rank: int) -> None:
    """Breaks the runtime of this rank process in one way."""
    FAULTS[fault](rank)


def _double_vision_gradient(rank: int) -> None:
    from megatron_mosaic.host import forward_backward

    finalize = forward_backward.finalize_gradients

    def finalize_and_double(runners: Any, **options: Any) -> None:
        finalize(runners, **options)
        if "vision" in runners:
            runners["vision"].model.scale_gradients(2.0)

    forward_backward.finalize_gradients = finalize_and_double


def _swap_replicas(rank: int) -> None:
    """Two data-parallel replicas of the language model get each other's rows."""
    from megatron_mosaic.comm import boundary

    make = boundary.BoundarySides

    def make_swapped(*, destination: Any, **others: Any) -> Any:
        first, second = (destination.rank_at(dp=dp) for dp in (0, 1))
        swapped = {first: second, second: first}
        ranks = tuple(swapped.get(rank, rank) for rank in destination.ranks)
        return make(destination=replace(destination, ranks=ranks), **others)

    boundary.BoundarySides = make_swapped


def _skip_boundary_gradient(rank: int) -> None:
    from megatron_mosaic.comm import boundary

    post = boundary.BoundaryChannel.post

    def post_nothing(self: Any, microbatch: int, leaving: Any) -> Any:
        if self._direction == "gradient" and microbatch == 1 and leaving is not None:
            leaving = leaving * 0
        return post(self, microbatch, leaving)

    boundary.BoundaryChannel.post = post_nothing


FAULTS: dict[str, Callable[[int], None]] = {
    "double_vision_gradient": _double_vision_gradient,
    "swap_replicas": _swap_replicas,
    "skip_boundary_gradient": _skip_boundary_gradient,
}
