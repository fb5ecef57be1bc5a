"""Auxiliary losses of mixture-of-experts layers, as the stock loop reports them."""

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.moe_logging import MetricEntry, get_moe_metrics_tracker

from megatron_mosaic.host.groups import ModuleGroups


class MoeMetrics:
    """Makes a step's metrics global, so that every rank reports the same.

    The stock loop reduces them over the groups of one collection per rank, and prints them on the
    last rank of the world: that may host no expert, and its collection is of groups of one.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._host_group = group
        self._num_layers: dict[str, int] | None = None

    def reduce(self, language: ModuleGroups | None) -> None:
        """Replaces what this rank's routers recorded by the language model's values.

        Args:
            language: Groups of the language model; None on ranks without it.

        Note:
            Collective over the world.
        """
        tracker = get_moe_metrics_tracker()
        for name, num_layers in self._agreed().items():
            tracker.ensure_initialized(name, num_layers)
            entry = tracker.metrics[name]
            share = torch.zeros_like(entry.values)
            if language is not None:
                share = entry.values * _weight(entry, language)
            dist.all_reduce(share)
            entry.values.copy_(share)
            # Nothing is left to reduce for the stock loop.
            entry.reduce_group = entry.avg_group = None
            entry.needs_dp_avg = False

    def _agreed(self) -> dict[str, int]:
        """Agrees on the metrics, once: ranks without routers do not know them."""
        if self._num_layers is None:
            recorded = get_moe_metrics_tracker().metrics
            own = {name: entry.values.numel() for name, entry in recorded.items()}
            every: list[dict[str, int]] = [{}] * dist.get_world_size()
            dist.all_gather_object(every, own, group=self._host_group)
            self._num_layers = {name: sizes[name] for sizes in every for name in sizes}
        return self._num_layers


def _weight(entry: MetricEntry, language: ModuleGroups) -> float:
    """Weight with which the ranks' values of a metric add up to Megatron's.

    Megatron sums over the stages and over ``reduce_group``, and averages over the other ranks of a
    stage, which then have equal values.
    """
    summed = 1 if entry.reduce_group is None else entry.reduce_group.size()
    shape = language.placement.shape
    return summed / (shape.tp * shape.cp * shape.dp)
