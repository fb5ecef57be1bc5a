"""Tasks as columns of numbers: thousands are made, sorted and joined at once."""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_mosaic.layout.plan import Plan
from megatron_mosaic.schedule.graph import Stage, needs_backward, stage_order
from megatron_mosaic.schedule.task import Task

Integers = NDArray[np.int64]


class TaskArrays(NamedTuple):
    """Tasks in some order.

    Args:
        stage: Stage of every task, as a position in a list.
        backward: 1 for a backward pass, 0 for a forward pass.
        first: First microbatch of every task.
        count: Its microbatches.
    """

    stage: Integers
    backward: Integers
    first: Integers
    count: Integers

    def at(self, index: Integers) -> "TaskArrays":
        """Some of the tasks, in the order of ``index``."""
        return TaskArrays(
            self.stage[index], self.backward[index], self.first[index], self.count[index]
        )

    def tasks(self, stages: Sequence[Stage]) -> Iterator[Task]:
        """Yields the tasks; ``stage`` counts ``stages``."""
        columns: list[list[int]] = [column.tolist() for column in self]
        for stage, backward, first, count in zip(*columns, strict=True):
            microbatches = (first,) if count == 1 else tuple(range(first, first + count))
            module, number = stages[stage]
            yield Task("B" if backward else "F", module, number, microbatches)


class DueTasks(NamedTuple):
    """Tasks of one stage and pass, in ascending microbatches.

    Args:
        stage: The stage.
        backward: Whether these are backward passes.
        first: First microbatch of every task.
        count: Its microbatches.
        due: When it is due, on any clock that all stages share.
    """

    stage: Stage
    backward: bool
    first: Integers
    count: Integers
    due: Integers


def in_order(plan: Plan, due: Iterable[DueTasks], *, forward_only: bool) -> TaskArrays:
    """Sorts tasks by when they are due; of two that are due at once the one given first is first.

    Backward tasks that nobody needs are left out: in evaluation all, else those of modules
    with nothing trainable at or upstream of them.

    Returns:
        Tasks whose ``stage`` counts the plan's ``stage_order``.
    """
    number = {stage: index for index, stage in enumerate(stage_order(plan))}
    backward = {name: not forward_only and needs_backward(plan, name) for name in plan.modules}
    kept = [own for own in due if backward[own.stage.module] or not own.backward]
    lengths = [len(own.first) for own in kept]
    columns = TaskArrays(
        stage=np.repeat([number[own.stage] for own in kept], lengths),
        backward=np.repeat([int(own.backward) for own in kept], lengths),
        first=np.concatenate([own.first for own in kept]),
        count=np.concatenate([own.count for own in kept]),
    )
    return columns.at(np.argsort(np.concatenate([own.due for own in kept]), kind="stable"))
