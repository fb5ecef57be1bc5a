"""When the tasks of a one-forward-one-backward pipeline are due."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_mosaic.schedule.graph import Stage
from megatron_mosaic.schedule.task import Task
from megatron_mosaic.schedule.task_arrays import DueTasks


@dataclass(frozen=True, kw_only=True, slots=True)
class Clock:
    """One clock for a whole pipeline: a forward pass takes one tick, a backward pass two.

    Sorting a stage's tasks by the ticks at which they are due gives 1F1B with as many warm-up
    microbatches as the stage's distance from the end. Every task is due after all that it
    depends on, so the tasks of all stages can be put into one order.

    Args:
        depth: Largest distance of a stage from the end of the pipeline, in stages.
        backward: Whether there are backward tasks.
    """

    # Three stages, three microbatches, with backward tasks. Forward tasks of the warm-up could
    # start before they are due; only the order matters.
    #
    # tick      0  1  2  3  4  5  6  7  8  9 10 11 12 13 14
    # stage 0  F0  .  . F1  .  . F2 B0 B0  . B1 B1  . B2 B2
    # stage 1   . F0  .  . F1 B0 B0 F2 B1 B1  . B2 B2  .  .
    # stage 2   .  . F0 B0 B0 F1 B1 B1 F2 B2 B2  .  .  .  .

    depth: int
    backward: bool

    def forward_start(self, microbatch: int, *, distance: int) -> int:
        """Tick at which a stage is due to start a forward pass."""
        ticks_per_microbatch = 3 if self.backward else 1
        return ticks_per_microbatch * microbatch + self.depth - distance

    def backward_start(self, microbatch: int, *, distance: int) -> int:
        """Tick at which a stage is due to start a backward pass.

        That is directly after the forward pass of the microbatch ``distance`` further on.
        """
        return self.forward_start(microbatch + distance, distance=distance) + 1

    def backward_end(self, microbatch: int, *, distance: int) -> int:
        """Tick at which a stage is due to have ended a backward pass."""
        return self.backward_start(microbatch, distance=distance) + 2


def pipeline_due(
    clock: Clock, distances: Mapping[Stage, int], *, num_microbatches: int
) -> Iterator[DueTasks]:
    """Tasks of a pipeline, one microbatch each, due at the middles of their times, in half ticks.

    Args:
        clock: The pipeline's clock.
        distances: The stages of the pipeline with their distances from its end, in stages.
        num_microbatches: Microbatches of the step.
    """
    # The clock only adds and multiplies, so it takes all microbatches at once.
    microbatch: Any = np.arange(num_microbatches)
    one = np.ones_like(microbatch)
    for stage, distance in distances.items():
        start: Any = clock.forward_start(microbatch, distance=distance)
        yield DueTasks(stage, False, microbatch, one, 2 * start + 1)
        if clock.backward:
            start = clock.backward_start(microbatch, distance=distance)
            yield DueTasks(stage, True, microbatch, one, 2 * start + 2)


def due_tasks(
    clock: Clock, distances: dict[Stage, int], *, num_microbatches: int
) -> list[tuple[int, Task]]:
    """Tasks of a pipeline, one microbatch each, with the middles of their times in half ticks.

    Args:
        distances: The stages of the pipeline with their distances from its end, in stages.
    """
    due = []
    for stage, distance in distances.items():
        for m in range(num_microbatches):
            start = clock.forward_start(m, distance=distance)
            due.append((2 * start + 1, Task("F", *stage, (m,))))
            if clock.backward:
                start = clock.backward_start(m, distance=distance)
                due.append((2 * start + 2, Task("B", *stage, (m,))))
    return due
