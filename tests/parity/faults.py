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

    def finalize_and_double(runners: Any, hosted: Any, **options: Any) -> None:
        finalize(runners, hosted, **options)
        if "vision" in runners:
            runners["vision"].wrapped.scale_gradients(2.0)

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


def _unmark_recomputed(rank: int) -> None:
    """Checkpointed layers behind frozen ones get inputs that need no gradient."""
    from megatron_mosaic.host import model

    model.keep_gradients_of_recomputed = lambda module: None


def _scale_auxiliary_losses_by_the_encoder(rank: int) -> None:
    """An encoder's forward step sets the scale of the routers' losses, as a dense one must not."""
    from megatron_mosaic.host.families import llava

    retarget = llava.retarget

    def retarget_with_experts(config: Any, placement: Any) -> Any:
        retargeted = retarget(config, placement)
        retargeted.num_moe_experts = config.num_moe_experts
        return retargeted

    llava.retarget = retarget_with_experts


def _keep_expert_gradients_apart(rank: int) -> None:
    """Replicas of an expert do not add up their gradients."""
    from megatron_mosaic.host import groups

    for field in ("expt_dp", "intra_expt_dp"):
        groups.EXPERT_AXES_OF_FIELD[field] = ()


FAULTS: dict[str, Callable[[int], None]] = {
    "double_vision_gradient": _double_vision_gradient,
    "swap_replicas": _swap_replicas,
    "skip_boundary_gradient": _skip_boundary_gradient,
    "unmark_recomputed": _unmark_recomputed,
    "scale_auxiliary_losses_by_the_encoder": _scale_auxiliary_losses_by_the_encoder,
    "keep_expert_gradients_apart": _keep_expert_gradients_apart,
}
