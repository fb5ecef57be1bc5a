"""Plays lists of tasks against each other: each task as soon as its turn and its inputs allow."""

from collections import deque
from collections.abc import Callable, Mapping, Sequence

from megatron_mosaic.layout.plan import Plan
from megatron_mosaic.schedule.graph import Stage, stage_order
from megatron_mosaic.schedule.schedule import Schedule
from megatron_mosaic.schedule.steps import crosses_steps, edges_of
from megatron_mosaic.schedule.task import Task

Needs = Mapping[tuple[str, Stage], Sequence[tuple[str, Stage]]]


def needs_of(plan: Plan, schedule: Schedule | None = None) -> Needs:
    """For each pass and stage the passes and stages that it takes its input from.

    What a module that runs ahead gives to the step is no input: it was made before.
    """
    needs: dict[tuple[str, Stage], list[tuple[str, Stage]]] = {}
    for stage in stage_order(plan):
        needs["F", stage] = []
        needs["B", stage] = [("F", stage)]
    for edge in edges_of(plan):
        here, there = Stage(*edge[:2]), Stage(*edge[2:])
        if schedule is None or not crosses_steps(schedule, edge):
            needs["F", there].append(("F", here))
        needs["B", here].append(("B", there))
    return needs


def play(
    lists: Sequence[Sequence[Task]], needs: Needs, *, lengths: Callable[[Task], float]
) -> dict[Task, tuple[float, float]]:
    """Runs lists of tasks of one microbatch, each on a rank of its own.

    What no list has counts as done.

    Returns:
        Start and end of every task.
    """
    present = {task for tasks in lists for task in tasks}
    times: dict[Task, tuple[float, float]] = {}
    position, free = [0] * len(lists), [0.0] * len(lists)
    waiting: dict[Task, list[int]] = {}
    ready = deque(range(len(lists)))
    while ready:
        k = ready.popleft()
        while position[k] < len(lists[k]):
            task = lists[k][position[k]]
            before = [
                Task("B" if kind == "B" else "F", *stage, task.microbatches)
                for kind, stage in needs[task.kind, Stage(task.module, task.stage)]
            ]
            before = [other for other in before if other in present]
            missing = next((other for other in before if other not in times), None)
            if missing is not None:
                waiting.setdefault(missing, []).append(k)
                break
            start = max([free[k], *(times[other][1] for other in before)])
            free[k] = start + lengths(task)
            times[task] = (start, free[k])
            position[k] += 1
            ready.extend(waiting.pop(task, ()))
    assert len(times) == len(present), "the lists must not wait for each other in a circle"
    return times
