"""Planted errors: the comparison must see each of them."""

from collections.abc import Callable
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

    kept = boundary.kept

    def kept_swapped(*arguments: Any, **options: Any) -> Any:
        ownership = kept(*arguments, **options)
        first, second = ownership.replicas[0], ownership.replicas[1]
        intervals = ownership.intervals
        swapped = dict.fromkeys(first, intervals[second[0]])
        swapped |= dict.fromkeys(second, intervals[first[0]])
        return type(ownership)(intervals=intervals | swapped, replicas=ownership.replicas)

    boundary.kept = kept_swapped


def _skip_boundary_gradient(rank: int) -> None:
    from megatron_mosaic.comm import boundary

    post = boundary.BoundaryChannel.post

    def post_nothing(self: Any, microbatch: int, leaving: Any) -> Any:
        if self._direction == "gradient" and microbatch == 1 and leaving is not None:
            leaving = leaving * 0
        return post(self, microbatch, leaving)

    boundary.BoundaryChannel.post = post_nothing


def _unmark_recomputed(rank: int) -> None:
    """Checkpointed layers behind frozen ones get inputs that need no gradient."""
    from megatron_mosaic.host import model

    model.keep_gradients_of_recomputed = lambda module: None


FAULTS: dict[str, Callable[[int], None]] = {
    "double_vision_gradient": _double_vision_gradient,
    "swap_replicas": _swap_replicas,
    "skip_boundary_gradient": _skip_boundary_gradient,
    "unmark_recomputed": _unmark_recomputed,
}
