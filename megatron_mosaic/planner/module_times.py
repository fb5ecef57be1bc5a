"""Times of a module's parts for one task, as bounds and choices need them."""

from typing import NamedTuple

from megatron_mosaic.cost.costs import ModuleCosts
from megatron_mosaic.planner.partition import chain_of


class ModuleTimes(NamedTuple):
    """Times of a module for one task.

    Args:
        total_s: Of all parts.
        longest_s: Of the longest layer.
        forward_share: Largest share of a part's time that is forward.
        forward_s: Forward passes of all parts.
    """

    total_s: float
    longest_s: float
    forward_share: float
    forward_s: float


def module_times(costs: ModuleCosts, *, trainable_upstream: bool) -> ModuleTimes:
    """Times of a module for one task."""
    times, input_s, output_s = chain_of(costs, trainable_upstream=trainable_upstream)
    parts = [costs.input, *costs.each_layer(), costs.output]
    every_s = [input_s, *times, output_s]
    shares = [p.forward_s / s for p, s in zip(parts, every_s, strict=True) if s]
    return ModuleTimes(
        total_s=sum(every_s),
        longest_s=max(times, default=0.0),
        forward_share=max(shares, default=0.0),
        forward_s=sum(part.forward_s for part in parts),
    )
