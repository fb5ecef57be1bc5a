"""What every task of a step had to wait for."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from megatron_mosaic.schedule.program import START, Inputs, Integers, Program

_Seconds = NDArray[np.float64]


def last_inputs(program: Program, *, end_s: _Seconds, edge_s: _Seconds | None = None) -> Integers:
    """Finds for every task the one that it waited for last, by when all of them ended.

    Args:
        program: The step's tasks, and what they wait for.
        end_s: When each ended.
        edge_s: Time of a microbatch on every edge of the program; 0 by default.

    Returns:
        Positions of tasks; ``START`` for one that waited for nothing. Of two that end at once it
        is the one whose output the task takes.
    """
    over_s = np.append(np.zeros(len(program.edges)) if edge_s is None else edge_s, 0.0)
    latest_s = np.full(len(end_s), -np.inf)
    found = np.full(len(end_s), START)
    for task, before, arrival_s in _arrivals(program, end_s, over_s):
        # One task after the other, as some wait for several of the other inputs.
        for own, maker, time_s in zip(task, before, arrival_s, strict=True):
            if maker != START and time_s > latest_s[own]:
                latest_s[own], found[own] = time_s, maker
    return found


def _arrivals(
    program: Program, end_s: _Seconds, over_s: _Seconds
) -> Iterator[tuple[list[int], list[int], list[float]]]:
    for inputs in (program.data, program.others, program.rank):
        yield (
            inputs.task.tolist(),
            inputs.before.tolist(),
            _arrival_s(inputs, end_s, over_s).tolist(),
        )


def _arrival_s(inputs: Inputs, end_s: _Seconds, over_s: _Seconds) -> _Seconds:
    return end_s[inputs.before] + over_s[inputs.edge] * inputs.passed
