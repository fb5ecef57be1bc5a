"""What Megatron's log says about a training run."""

import re
from dataclasses import dataclass, field
from statistics import median

_NUMBER = r"([-+.\dEe]+|nan|inf)"
_STEP = re.compile(
    rf"iteration +(\d+)/ *\d+ \|.*?elapsed time per iteration \(ms\): {_NUMBER}"
    rf".*?lm loss: {_NUMBER}"
)
_EVALUATION = re.compile(rf"validation loss at iteration \d+.*?accuracy value: {_NUMBER}")
# The first steps pay for allocations and first-time set-up.
_WARM_UP_STEPS = 5


@dataclass(kw_only=True)
class TrainingLog:
    """Losses, times and held-out accuracy of a run, filled line by line.

    Args:
        losses: Training loss of every step, the first step first.
        step_times_s: Duration of every step.
        accuracy: Part of the held-out images that were named right; None until evaluated.
    """

    losses: list[float] = field(default_factory=list)
    step_times_s: list[float] = field(default_factory=list)
    accuracy: float | None = None

    def read(self, line: str) -> bool:
        """Takes a line of the log. Returns whether it told something."""
        if found := _STEP.search(line):
            # After a line that was lost no other counts, so the number of steps tells.
            if int(found[1]) == len(self.losses) + 1:
                self.step_times_s.append(float(found[2]) / 1000)
                self.losses.append(float(found[3]))
            return True
        if found := _EVALUATION.search(line):
            self.accuracy = float(found[1])
            return True
        return False

    @property
    def step_s(self) -> float:
        """Median duration of a step after warm-up."""
        return median(self.step_times_s[_WARM_UP_STEPS:] or self.step_times_s)
