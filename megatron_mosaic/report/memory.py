"""Memory of a rank over a step."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_mosaic.report.prediction import Memory, Prediction
from megatron_mosaic.schedule.graph import Stage
from megatron_mosaic.schedule.program import Integers, Program
from megatron_mosaic.schedule.simulate import Seconds


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class MemoryOverTime:
    """What a rank holds at the beginning of a step and after each change.

    Args:
        time_s: Of the changes, rising; the first is the beginning of the step.
        activations: Bytes of every module's activations at these times.
        rest_bytes: All that does not change, with what a task works with at most.
    """

    time_s: Seconds
    activations: Mapping[str, Seconds]
    rest_bytes: float

    @property
    def total_bytes(self) -> Seconds:
        """Of everything, at the times."""
        return sum(self.activations.values(), np.full(len(self.time_s), self.rest_bytes))


def memory_over_time(
    program: Program,
    prediction: Prediction,
    *,
    rank: int,
    index: Integers,
    start_s: Seconds,
    end_s: Seconds,
) -> MemoryOverTime | None:
    """Follows a rank's memory through its tasks.

    Activations live from the beginning of a forward task to the end of its backward task, or to
    the end of the forward task where there is no backward one. Of forward tasks that a schedule
    runs for the next step the first ones were run before this one began.

    Args:
        program: The step's tasks.
        prediction: Bytes of tasks, and of what stays.
        rank: The rank.
        index: Its tasks, as positions in the program.
        start_s: When each starts.
        end_s: When it ends.

    Returns:
        Its memory; ``None`` where the prediction does not say what it holds.
    """
    held = next((bar for bar in prediction.memory if bar.holds(rank)), None)
    if held is None or not prediction.task_bytes:
        return None
    names = list(dict.fromkeys(stage.module for stage in program.stages))
    time_s, module, change = _changes(program, prediction.task_bytes, names, index, start_s, end_s)
    order = np.argsort(time_s, kind="stable")
    steps = np.zeros((len(order) + 1, len(names)))
    steps[np.arange(1, len(order) + 1), module[order]] = change[order]
    level = steps.cumsum(axis=0)
    level -= level.min(axis=0)  # what was there before the step
    shown = [n for n in range(len(names)) if level[:, n].any()]
    return MemoryOverTime(
        time_s=np.concatenate([[0.0], time_s[order]]),
        activations={names[n]: level[:, n] for n in shown},
        rest_bytes=_rest_bytes(held),
    )


def _rest_bytes(held: Memory) -> float:
    return sum(size for term, size in held.terms.items() if term != "activations")


def _changes(
    program: Program,
    task_bytes: Mapping[Stage, float],
    names: Sequence[str],
    index: Integers,
    start_s: Seconds,
    end_s: Seconds,
) -> tuple[Seconds, Integers, Seconds]:
    """When the activations of which module grow, or shrink, by how many bytes."""
    stage, backward, _, count = (column[index] for column in program.tasks)
    longest = np.ones(len(program.stages), dtype=np.int64)
    np.maximum.at(longest, stage, count)
    per_stage = np.array([task_bytes[each] for each in program.stages])
    size = per_stage[stage] * count / longest[stage]
    module = np.array([names.index(each.module) for each in program.stages])[stage]
    is_made = backward == 0
    is_freed = (backward == 1) | ~np.isin(stage, stage[backward == 1])
    time_s = np.concatenate([start_s[is_made], end_s[is_freed]])
    change = np.concatenate([size[is_made], -size[is_freed]])
    return time_s, np.concatenate([module[is_made], module[is_freed]]), change
