import pytest
import torch

from megatron_mosaic.profile.timing import Stopwatch


def _count_runs(budget_s):
    runs = []
    stopwatch = Stopwatch(device=torch.device("cpu"), budget_s=budget_s, least=4, most=6, warm_up=2)
    assert stopwatch.median_s(lambda: runs.append(1)) >= 0
    return len(runs)


def test_stopwatch_repeats_at_least_so_often():
    # Two runs to warm up, one to see how long it takes.
    assert _count_runs(0.0) == 2 + 1 + 4


def test_stopwatch_repeats_at_most_so_often():
    assert _count_runs(1e6) == 2 + 1 + 6


def test_stopwatch_of_a_gpu_takes_the_times_between_its_events(monkeypatch):
    marked = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            marked.append(self)

        def elapsed_time(self, later):
            return 2.0 * (marked.index(later) - marked.index(self))

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    stopwatch = Stopwatch(device=torch.device("cuda", 0), budget_s=1.0, warm_up=0)

    # Two milliseconds between two marks.
    assert stopwatch.times_s(lambda: None, repeats=3) == pytest.approx([2e-3] * 3)
