"""Which items of a step each replica of an encoder runs, where the plan deals them by cost.

An item is what an encoder runs by itself: an image of a sample, or all that a sample has of a
modality where only the script knows more. Every rank derives the same from the facts of samples.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

from megatron_mosaic.host.data.facts import SampleFacts
from megatron_mosaic.host.data.shares import Microbatches, deals_items
from megatron_mosaic.layout.item_costs import ItemCost, Owners
from megatron_mosaic.layout.items import balanced_items
from megatron_mosaic.layout.ownership import Runs
from megatron_mosaic.layout.plan import Plan
from megatron_mosaic.schedule.schedule import Schedule
from megatron_mosaic.schedule.steps import tasks_of

StepOwners = Mapping[str, Mapping[Microbatches, Owners]]
"""Replica of every item, by module, task, and sample of the task."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ItemDeal:
    """Deals the items of one module's tasks to its replicas.

    Args:
        tasks: Microbatches of every task.
        data_parallel_size: Replicas.
        cost: Sizes of its items and what they cost.
    """

    tasks: tuple[Microbatches, ...]
    data_parallel_size: int
    cost: ItemCost

    def owners(self, samples: Sequence[Runs]) -> Owners:
        """Finds the replica of every item of a task.

        Args:
            samples: Where the boundary rows of each of its samples belong.
        """
        sizes = [self.cost.sizes(runs) for runs in samples]
        costs = [self.cost.flops(size) for sample in sizes for size in sample]
        owners = iter(
            balanced_items(
                costs, dp=self.data_parallel_size, samples=[len(sample) for sample in sizes]
            )
        )
        return tuple(tuple(islice(owners, len(sample))) for sample in sizes)


def item_deals(
    plan: Plan, schedule: Schedule, costs: Mapping[str, ItemCost]
) -> dict[str, ItemDeal]:
    """Finds the modules whose items are dealt by cost.

    Args:
        plan: The plan.
        schedule: Order of the tasks of a step; equal on all ranks.
        costs: Sizes and costs of every module's items.
    """
    return {
        name: ItemDeal(
            tasks=tuple(tasks_of(schedule, plan, name)),
            data_parallel_size=placement.data_parallel_size,
            cost=costs[name],
        )
        for name, placement in plan.modules.items()
        if deals_items(placement)
    }


def deal_step(
    deals: Mapping[str, ItemDeal], facts: Sequence[SampleFacts], *, microbatch_size: int
) -> StepOwners:
    """Deals the items of a step.

    Args:
        deals: Modules whose items are dealt by cost.
        facts: Facts of every sample of the step.
        microbatch_size: Samples of a global microbatch.
    """

    def owners(name: str, task: Microbatches) -> Owners:
        first = task[0] * microbatch_size
        samples = facts[first : first + len(task) * microbatch_size]
        return deals[name].owners([sample.rows[name] for sample in samples])

    return {name: {task: owners(name, task) for task in deal.tasks} for name, deal in deals.items()}


def items_of(owners: Owners, *, dp: int) -> list[tuple[int, ...]]:
    """Items of every sample of a task that one replica runs, by their number in the sample."""
    return [tuple(item for item, owner in enumerate(sample) if owner == dp) for sample in owners]
