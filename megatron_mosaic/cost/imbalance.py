"""How much longer the slowest replica of a module works than the mean, as items differ in size."""

from dataclasses import dataclass, replace
from typing import Self

import numpy as np
from numpy.typing import NDArray

from megatron_mosaic.cost.costs import ModuleCosts, PartCosts, PartRun
from megatron_mosaic.cost.model_flops import forward_flops_per_token
from megatron_mosaic.layout.items import balanced_items
from megatron_mosaic.layout.placement import ItemOrder
from megatron_mosaic.model.spec import ModuleSpec
from megatron_mosaic.model.workload import SEED, draw
from megatron_mosaic.tokens.ranges import Integers

_POOL = 8192
"""Samples that are drawn: the mean of the slowest of 64 replicas is then known to 1 %."""

_BALANCED_ITEMS = 4096
"""Items up to which several tasks are balanced; of a longer one the first says as much."""

_BALANCED_TASKS = 8

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, eq=False)
class DrawnItems:
    """Items drawn from a module's distributions.

    Args:
        work: Work of every item, in FLOPs of its forward pass.
        number: Items of every sample.
    """

    work: Floats
    number: Integers

    @classmethod
    def of(cls, module: ModuleSpec) -> Self:
        """Draws items of a module.

        The work of an item grows with its tokens, and in attention with their square.
        """
        random = np.random.default_rng(SEED)
        number = draw(module.items_per_sample, count=_POOL, random=random)
        tokens = draw(module.tokens_per_item, count=int(number.sum()), random=random)
        linear = forward_flops_per_token(module, pairs_per_token=0.0)
        square = forward_flops_per_token(module, pairs_per_token=1.0) - linear
        return cls(work=tokens * (linear + square * tokens), number=number)

    @property
    def per_sample(self) -> Floats:
        """Work of every sample."""
        sample = np.repeat(np.arange(len(self.number)), self.number)
        return np.bincount(sample, weights=self.work, minlength=len(self.number))

    def imbalance(self, *, num_samples: int, dp: int, items: ItemOrder) -> float:
        """Work of the slowest replica over the mean of all, on average over tasks.

        Args:
            num_samples: Samples of a task, of all replicas.
            dp: Replicas.
            items: Which of them runs which items.
        """
        loads = self._in_order(num_samples, dp)
        if items == "balanced":
            loads = self._balanced(num_samples, dp)
        return float(loads.max(axis=1).mean() / loads.mean()) if loads.any() else 1.0

    def _in_order(self, num_samples: int, dp: int) -> Floats:
        """Work of each replica in each task ``[tasks, dp]``."""
        tasks = max(1, _POOL // num_samples)
        work = np.resize(self.per_sample, (tasks, dp, num_samples // dp))
        return work.sum(axis=2)

    def _balanced(self, num_samples: int, dp: int) -> Floats:
        stops = np.concatenate(([0], np.cumsum(self.number)))
        loads: list[Floats] = []
        num_items = 0
        for first in range(0, max(_POOL - num_samples, 0) + 1, num_samples):
            work = self.work[stops[first] : stops[min(first + num_samples, _POOL)]]
            samples = self.number[first : first + num_samples]
            owner = balanced_items(work.tolist(), dp=dp, samples=samples.tolist())
            loads.append(np.bincount(owner, weights=work, minlength=dp))
            num_items += len(work)
            if num_items > _BALANCED_ITEMS or len(loads) == _BALANCED_TASKS:
                break
        return np.stack(loads)


def items_vary(module: ModuleSpec) -> bool:
    """Whether samples of a module differ in number or size of their items."""
    return len(module.items_per_sample.values) > 1 or len(module.tokens_per_item.values) > 1


def slowed(costs: ModuleCosts, *, imbalance: float) -> ModuleCosts:
    """Costs of the slowest replica, from those of a mean one.

    Args:
        costs: Of a mean replica.
        imbalance: Work of the slowest one over the mean.
    """
    return replace(
        costs,
        input=_slowed(costs.input, imbalance),
        layers=tuple(PartRun(run.count, _slowed(run.costs, imbalance)) for run in costs.layers),
        output=_slowed(costs.output, imbalance),
    )


def _slowed(part: PartCosts, imbalance: float) -> PartCosts:
    longer = imbalance - 1
    back_s = part.trainable * part.weight_gradient_s + part.input_gradient_s + part.recompute_s
    return replace(
        part,
        forward_s=imbalance * part.forward_s,
        input_gradient_s=imbalance * part.input_gradient_s,
        weight_gradient_s=imbalance * part.weight_gradient_s,
        recompute_s=imbalance * part.recompute_s,
        forward_bytes=imbalance * part.forward_bytes,
        input_gradient_bytes=imbalance * part.input_gradient_bytes,
        weight_gradient_bytes=imbalance * part.weight_gradient_bytes,
        recompute_bytes=imbalance * part.recompute_bytes,
        forward_communication_s=imbalance * part.forward_communication_s,
        backward_communication_s=imbalance * part.backward_communication_s,
        forward_imbalance_s=longer * (part.forward_s - part.forward_communication_s),
        backward_imbalance_s=longer * (back_s - part.backward_communication_s),
    )
