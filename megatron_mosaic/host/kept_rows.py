"""What frozen encoders made for a step while the step before it ran."""

import argparse

from megatron_mosaic.engine.walk import Rows
from megatron_mosaic.host.data.reader import StepBatches
from megatron_mosaic.host.randomness import ModuleRandomness, ModuleStates
from megatron_mosaic.schedule.ahead import Part
from megatron_mosaic.schedule.schedule import Schedule


class KeptRows:
    """Rows for the next step, and the random states of the modules that made them.

    Nothing of it goes into a checkpoint: a resumed run makes the rows of its first step anew. So
    between steps the modules have the random states from before, which a checkpoint saves, and
    dropout repeats to the bit.

    Args:
        randomness: Random states of the modules on this rank.
    """

    def __init__(self, randomness: ModuleRandomness) -> None:
        self._randomness = randomness
        self._first_sample: int | None = None
        self._rows: Rows = {}
        self._states: ModuleStates = {}

    def part(self, schedule: Schedule, batches: StepBatches, *, is_last: bool) -> Part:
        """Finds out what a step has to walk, on all ranks alike."""
        if not schedule.ahead:
            return Part(0)
        begins = Part.BEGINS if self._first_sample != batches.first_sample else Part(0)
        return begins | (Part.ENDS if is_last or batches.ahead is None else Part(0))

    def take(self, part: Part) -> Rows:
        """Hands the rows over to their step, and goes on where the random states stood then."""
        rows, states = self._rows, self._states
        self._first_sample, self._rows, self._states = None, {}, {}
        if Part.BEGINS in part:
            return {}  # those of another step, if any
        self._randomness.exchange(states)
        return rows

    def put(self, rows: Rows, *, of: StepBatches, before: ModuleStates) -> None:
        """Keeps what was made of the next step's samples.

        Args:
            rows: What was made.
            of: The next step's data.
            before: Random states of the modules before they made it.
        """
        self._rows, self._first_sample = rows, of.first_sample
        self._states = self._randomness.exchange(before)


def is_last_step(args: argparse.Namespace) -> bool:
    """Whether training ends with this step, or stops there for this time."""
    trained = getattr(args, "curr_iteration", -1) + 1
    stops = bool(args.exit_interval) and trained % args.exit_interval == 0
    return stops or trained >= args.train_iters
