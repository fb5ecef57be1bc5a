"""Times what runs on a device, by its own clock."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch

Run = Callable[[], object]


@dataclass(frozen=True, kw_only=True, slots=True)
class Stopwatch:
    """Repeats something and takes the median.

    Args:
        device: Where it runs. On CUDA events on the stream are timed, so that the host's part is
            not, as long as it runs ahead.
        budget_s: Time to spend on repeating one thing.
        least: Repeats at least.
        most: Repeats at most.
        warm_up: Runs before, which are not timed.
    """

    device: torch.device
    budget_s: float
    least: int = 5
    most: int = 200
    warm_up: int = 3

    def median_s(self, run: Run) -> float:
        """Times something as often as the budget allows."""
        for _ in range(self.warm_up):
            run()
        repeats = int(self.budget_s / max(self._times(run, 1)[0], 1e-9))
        return statistics.median(self._times(run, min(max(repeats, self.least), self.most)))

    def times_s(self, run: Run, *, repeats: int) -> list[float]:
        """Times something a number of times, the same on every rank that takes part."""
        for _ in range(self.warm_up):
            run()
        return self._times(run, repeats)

    def _times(self, run: Run, repeats: int) -> list[float]:
        return self._device_times(run, repeats) if self._is_cuda else _host_times(run, repeats)

    def _device_times(self, run: Run, repeats: int) -> list[float]:
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
        torch.cuda.synchronize(self.device)
        marks[0].record()
        for mark in marks[1:]:
            run()
            mark.record()
        torch.cuda.synchronize(self.device)
        return [start.elapsed_time(stop) * 1e-3 for start, stop in pairwise(marks)]  # from ms

    @property
    def _is_cuda(self) -> bool:
        return self.device.type == "cuda"


def _host_times(run: Run, repeats: int) -> list[float]:
    times = []
    for _ in range(repeats):
        start_s = time.perf_counter()
        run()
        times.append(time.perf_counter() - start_s)
    return times
