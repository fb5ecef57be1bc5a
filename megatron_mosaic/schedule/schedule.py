"""A schedule: for every rank the ordered list of its tasks."""

import hashlib
from dataclasses import dataclass

import numpy as np

from megatron_mosaic.layout.plan import Plan
from megatron_mosaic.schedule.graph import rank_kinds, stage_order
from megatron_mosaic.schedule.task import Task
from megatron_mosaic.schedule.task_arrays import TaskArrays


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """What every rank does in one step, in order.

    Args:
        num_microbatches: Global microbatches of the step.
        forward_only: Evaluation: there are no backward tasks.
        tasks: Task lists by global rank; a rank that hosts nothing has an empty one. Replicas
            of the same stages have equal lists.
        ahead: Frozen modules whose forward tasks here are those of the next step. What they made
            in the step before is kept by the ranks that made it and goes to the modules that use
            it now. Before the first step they run once more.
        receives_early: Ranks that run an encoder post the receives of its gradients as soon as
            they have sent its activations. Then they need not come to its backward tasks
            together, as each may run them at another place of its list.
    """

    num_microbatches: int
    forward_only: bool
    tasks: tuple[tuple[Task, ...], ...]
    ahead: frozenset[str] = frozenset()
    receives_early: bool = False

    def digest(self) -> str:
        """SHA-256, in hexadecimal, of what every rank does."""
        own = {id(tasks): tasks for tasks in self.tasks}  # replicas share their list
        lists = {key: ";".join(map(str, tasks)) for key, tasks in own.items()}
        lists_of_ranks = (lists[id(tasks)] for tasks in self.tasks)
        content = [self.num_microbatches, self.forward_only, *lists_of_ranks]
        if self.ahead or self.receives_early:
            content += [sorted(self.ahead), self.receives_early]
        return hashlib.sha256("\n".join(map(str, content)).encode()).hexdigest()


def restrict(
    order: TaskArrays, *, plan: Plan, num_microbatches: int, forward_only: bool
) -> Schedule:
    """Gives every rank the tasks it hosts, in one order common to all ranks.

    Such a schedule cannot deadlock if ``order`` lists every task after those it depends on and
    every stage's microbatches in ascending order. Take the first task of ``order`` that is not
    done: each rank that hosts it has finished what precedes it on its own list, so all of them
    have arrived at it together (a tensor-parallel group too), and every transfer it waits for
    was posted by all its participants, none of which has an older one unfinished.

    Args:
        order: Tasks that the plan needs, of all its stages.
        plan: The plan.
        num_microbatches: Global microbatches of the step.
        forward_only: Whether it is one of evaluation.
    """
    stages = stage_order(plan)
    every = list(order.tasks(stages))
    tasks: list[tuple[Task, ...]] = [()] * plan.world_size
    for kind in rank_kinds(plan):
        hosted = np.isin(np.arange(len(stages)), [stages.index(stage) for stage in kind.stages])
        own = tuple(every[index] for index in np.flatnonzero(hosted[order.stage]).tolist())
        for rank in kind.ranks:
            tasks[rank] = own
    return Schedule(
        num_microbatches=num_microbatches, forward_only=forward_only, tasks=tuple(tasks)
    )


def peak_live(schedule: Schedule, rank: int, module: str, *, stage: int | None = None) -> int:
    """Most tasks of a module, or of one stage, whose activations one rank holds at the same time.

    A task holds activations from its forward pass until its backward pass has run. Without a
    backward pass they go as soon as the forward pass ends. For an encoder whose tasks take a
    group of microbatches the result counts groups.
    """
    tasks = [
        task
        for task in schedule.tasks[rank]
        if task.module == module and stage in (None, task.stage)
    ]
    if all(task.kind == "F" for task in tasks):
        return min(len(tasks), 1)
    live = peak = 0
    for task in tasks:
        live += 1 if task.kind == "F" else -1
        peak = max(peak, live)
    return peak
