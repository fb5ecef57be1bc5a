"""Tasks that have a GPU to themselves, although other modules run on it at the same time.

Such a task comes, by what tasks wait for, after or before every task of other lanes of its ranks,
and so does the other pass of its microbatches. Only the schedule decides that, no duration does: it
holds on all replicas, in every step.
"""

import numpy as np

from megatron_mosaic.layout.plan import Plan
from megatron_mosaic.schedule.graph import rank_kinds
from megatron_mosaic.schedule.lanes import has_lanes
from megatron_mosaic.schedule.program import START, Program, program_of
from megatron_mosaic.schedule.schedule import Schedule
from megatron_mosaic.schedule.task import Task
from megatron_mosaic.schedule.task_arrays import Integers


def alone_tasks(plan: Plan, schedule: Schedule, rank: int) -> frozenset[Task]:
    """Tasks of a rank beside which, in both passes, nothing else can run; none without lanes."""
    kind = next((kind for kind in rank_kinds(plan) if rank in kind.ranks), None)
    if kind is None or not has_lanes(plan):
        return frozenset()
    program = program_of(plan, schedule)
    alone = is_alone(program)
    return frozenset(program.task(int(n)) for n in program.tasks_of(kind) if alone[n])


def is_alone(program: Program) -> np.ndarray:
    """Whether each task of a program is alone on all ranks that run it; ``[tasks]``.

    Both passes of the same microbatches are, or none is: autograd runs a backward pass on the
    streams of its forward pass, and so with the quota or without it as that one ran.
    """
    first = program.tasks.first
    pairs = program.tasks.stage * (1 + first.max(initial=0)) + first
    _, pair = np.unique(pairs, return_inverse=True)
    both = np.ones(1 + pair.max(initial=-1), dtype=bool)
    np.logical_and.at(both, pair, _is_alone_now(program))
    return both[pair]


def _is_alone_now(program: Program) -> np.ndarray:
    """Whether each task is alone while it runs, whatever its other pass is; ``[tasks]``."""
    latest, earliest = _reach(program)
    alone = np.empty(len(program.tasks.stage), dtype=bool)
    for part, own in enumerate(program.lanes):
        kinds = program.parts[part].kinds
        others = [
            lane
            for other, lanes in enumerate(program.lanes)
            for kind, lane in zip(program.parts[other].kinds, lanes, strict=True)
            if kind in kinds and lane not in own
        ]
        tasks = np.flatnonzero(program.tasks.stage == part)
        # Of each other lane everything is either before the task or after it.
        covered = latest[tasks][:, others] + 1 == earliest[tasks][:, others]
        alone[tasks] = covered.all(axis=1)
    return alone


def _reach(program: Program) -> tuple[Integers, Integers]:
    """Of every lane the last task that each task comes after, and the first that comes after it.

    Returns:
        Two arrays ``[tasks, lanes]`` of positions in the lanes: -1 where nothing comes before,
        the number of the lane's tasks where nothing comes after.
    """
    stage = program.tasks.stage
    num_lanes = 1 + max(lane for own in program.lanes for lane in own)
    length = np.zeros(num_lanes, dtype=np.int64)
    own_places = []
    for part in stage.tolist():
        lanes = list(program.lanes[part])
        own_places.append((lanes, length[lanes]))
        length[lanes] += 1
    # The last row stands for START.
    latest = np.full((len(stage) + 1, num_lanes), -1)
    earliest = np.tile(length, (len(stage) + 1, 1))
    waits = _waits(program)
    for task, before in enumerate(waits):
        row = latest[task]
        for other in before:
            np.maximum(row, latest[other], out=row)
        lanes, places = own_places[task]
        row[lanes] = places
    for task in reversed(range(len(stage))):
        row = earliest[task]
        lanes, places = own_places[task]
        row[lanes] = places
        for other in waits[task]:
            if other != START:
                np.minimum(earliest[other], row, out=earliest[other])
    return latest, earliest


def _waits(program: Program) -> list[list[int]]:
    """What each task waits for, ``START`` among it."""
    waits = [
        [*pair]
        for pair in zip(program.rank.before.tolist(), program.data.before.tolist(), strict=True)
    ]
    for task, before in zip(*map(np.ndarray.tolist, program.others[:2]), strict=True):
        waits[task].append(before)
    return waits
