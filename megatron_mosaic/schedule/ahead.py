"""Where training begins and ends, under a schedule whose frozen encoders run a step ahead."""

from collections.abc import Sequence
from enum import IntFlag

from megatron_mosaic.schedule.schedule import Schedule
from megatron_mosaic.schedule.steps import Compute, Step


class Part(IntFlag):
    """What a step walks of its schedule. The two may come together.

    Without any the step has been prepared, and prepares the next one.
    """

    BEGINS = 1  # nothing was made for it: what runs ahead first runs on its own samples
    ENDS = 2  # no step comes after it: nothing runs ahead


def steps_of_part(steps: Sequence[Step], schedule: Schedule, part: Part) -> tuple[Step, ...]:
    """What a rank walks of its steps, in order."""
    return prologue_of(steps, schedule, part) + steps_after_prologue(steps, schedule, part)


def prologue_of(steps: Sequence[Step], schedule: Schedule, part: Part) -> tuple[Step, ...]:
    """Steps of a rank that make what should have been made in the step before.

    They can run alone: what runs ahead waits for nothing but what runs ahead.
    """
    if Part.BEGINS not in part:
        return ()
    return tuple(step for step in steps if runs_ahead(schedule, step))


def steps_after_prologue(steps: Sequence[Step], schedule: Schedule, part: Part) -> tuple[Step, ...]:
    """Steps of a rank that follow the prologue; in most training steps these are all."""
    if Part.ENDS not in part:
        return tuple(steps)
    return tuple(step for step in steps if not runs_ahead(schedule, step))


def runs_ahead(schedule: Schedule, step: Step) -> bool:
    """Whether a step of a rank is about the next step's samples."""
    if isinstance(step, Compute):
        return step.task.module in schedule.ahead
    edge = step.transfer.edge
    return {edge.source, edge.destination} <= schedule.ahead
