"""Which replica of an encoder runs which items of a task, such as images, by their cost.

Only Python's own arithmetic, in a fixed order: every rank finds the same owners without talking.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass, field
from heapq import heapreplace, nsmallest

from megatron_mosaic.layout.rows import split_evenly

# Swaps are not worth their time where the slowest replica is this near to the mean: on images of
# long-tailed sizes the first pass alone comes nearer (benchmarks/encoder_balance.py), and a swap
# among 64 replicas takes about as long as that pass.
_TOLERANCE = 2e-2
_MAX_SWAPS = 64
_PARTNERS = 8  # least loaded replicas that the slowest one may swap items with


def balanced_items(
    costs: Sequence[float], *, dp: int, samples: Sequence[int] | None = None
) -> list[int]:
    """Gives every replica items that cost about as much as those of any other.

    The most expensive item that is left goes to the least loaded replica; then the most loaded
    replica moves or swaps items as long as that helps.

    Args:
        costs: Of every item, in the order of the task.
        dp: Replicas of the encoder.
        samples: Items of each sample of the task. Where samples in order are as good, they stay
            in order; without them no order is known.

    Returns:
        Replica of every item. Its slowest one has no more to do than with samples in order.

    Source: R. L. Graham, Bounds on multiprocessing timing anomalies, 1969, for the first pass.
    """
    owners, slowest = _longest_first(costs, dp=dp)
    least = max(sum(costs) / dp * (1 + _TOLERANCE), max(costs, default=0.0))
    if slowest > least:
        loads = _loads_of(costs, owners, dp=dp)
        _improve(loads, least=least)
        for load in loads:
            for _, item in load.items:
                owners[item] = load.replica
    if samples is None:
        return owners
    in_order = items_in_order(samples, dp=dp)
    if _slowest(costs, in_order, dp=dp) <= _slowest(costs, owners, dp=dp):
        return in_order
    return owners


def items_in_order(samples: Sequence[int], *, dp: int) -> list[int]:
    """Gives every replica the items of equally many consecutive samples.

    Args:
        samples: Items of each sample of the task.
        dp: Replicas of the encoder.
    """
    shares = split_evenly(len(samples), dp)
    return [
        replica
        for replica, share in enumerate(shares)
        for sample in range(*share)
        for _ in range(samples[sample])
    ]


@dataclass(order=True, slots=True)
class _Load:
    """What a replica has to do; the least loaded one sorts first.

    Args:
        cost: Of all its items.
        replica: Its number.
        items: Cost and number of each, ascending.
    """

    cost: float
    replica: int
    items: list[tuple[float, int]] = field(default_factory=list, compare=False)

    def replace(self, old: Sequence[tuple[float, int]], new: Sequence[tuple[float, int]]) -> None:
        for each in old:
            self.items.remove(each)
        for each in new:
            insort(self.items, each)
        # Added up anew: differences of large numbers would leave rounding behind.
        self.cost = sum(cost for cost, _ in self.items)


def _longest_first(costs: Sequence[float], *, dp: int) -> tuple[list[int], float]:
    """Gives each item to the least loaded replica. Returns the owners and the greatest load."""
    heap = [(0.0, replica) for replica in range(dp)]
    owners = [0] * len(costs)
    # Stable: items of one cost stay in the order of the task.
    for item in sorted(range(len(costs)), key=[-cost for cost in costs].__getitem__):
        load, replica = heap[0]
        owners[item] = replica
        heapreplace(heap, (load + costs[item], replica))
    return owners, max(load for load, _ in heap)


def _loads_of(costs: Sequence[float], owners: Sequence[int], *, dp: int) -> list[_Load]:
    items: list[list[tuple[float, int]]] = [[] for _ in range(dp)]
    for item, replica in enumerate(owners):
        items[replica].append((costs[item], item))
    return [
        _Load(sum(cost for cost, _ in own), replica, sorted(own))
        for replica, own in enumerate(items)
    ]


def _improve(loads: Sequence[_Load], *, least: float) -> None:
    """Relieves the most loaded replica as long as that helps, down to a load that is enough."""
    for _ in range(_MAX_SWAPS):
        worst = max(loads)
        if worst.cost <= least or not _relieve(worst, loads):
            return


def _relieve(worst: _Load, loads: Sequence[_Load]) -> bool:
    """Makes the best swap of the most loaded replica with a little loaded one, if any helps.

    A swap is an item for a cheaper one, or for none. The best leaves both nearest to their mean.
    """
    best: tuple[float, _Load, tuple[float, int], tuple[float, int] | None] | None = None
    for other in nsmallest(_PARTNERS, loads):
        wanted = (worst.cost - other.cost) / 2
        for own in worst.items:
            index = bisect_left(other.items, (own[0] - wanted, -1))
            theirs = [None, *other.items[max(0, index - 1) : index + 1]]
            for each in theirs:
                moved = own[0] - (each[0] if each else 0.0)
                larger = max(worst.cost - moved, other.cost + moved)
                if other is not worst and (best is None or larger < best[0]):
                    best = (larger, other, own, each)
    # Less by rounding alone is no gain, and could go on for ever.
    if best is None or best[0] >= worst.cost * (1 - 1e-9):
        return False
    _, other, own, each = best
    given = [] if each is None else [each]
    worst.replace([own], given)
    other.replace(given, [own])
    return True


def _slowest(costs: Sequence[float], owners: Sequence[int], *, dp: int) -> float:
    loads = [0.0] * dp
    for cost, owner in zip(costs, owners, strict=True):
        loads[owner] += cost
    return max(loads)
