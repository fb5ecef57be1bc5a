"""What telemetry costs a step, on real ranks, with and without it side by side in one run.

    python -m benchmarks.telemetry_cost [--steps 120]      # minutes on two cores; writes results

Every second step is recorded and reported, the others are as if there were no telemetry. Each rank
also adds up the time inside its calls: the difference of two kinds of steps has the noise of both,
that sum has none. On a GPU a mark is an event and not a look at the clock, and steps take longer.
"""

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

from benchmarks.machine import read_results, write_results
from tests.parity.record import ARGUMENTS, OPTIMIZERS
from tests.ranks import run_ranks

PLAN = """
format: 1
world_size: 2
global_batch_size: 32
micro_batch_size: 2
modules:
  vision: {ranks: 0-1, data_parallel_size: 2}
  language: {ranks: 0-1, pipeline_model_parallel_size: 2}
edges: [[vision, language]]
schedule: {kind: colocated, encoder_group: 4}
predicted:
  step_s: 1.0
  breakdown: {compute_s: 0.7, bubble_s: 0.2, sync_s: 0.05, optimizer_s: 0.05}
  tasks_s: {vision.0: [0.1, 0.1], language.0: [0.01, 0.02], language.1: [0.01, 0.02]}
"""
OPTIONS = ["--hidden-size", "256", "--ffn-hidden-size", "1024", "--log-interval", "2"]
OPTIONS += ["--global-batch-size", "32", "--eval-interval", "100000", "--images", "ragged"]
_WARM_UP = 10  # steps that do not count


def _train(rank: int, plan_path: str, steps: int) -> dict[str, Any]:
    """Trains, and returns the times of every step and of every report."""
    from megatron_mosaic.host import training
    from megatron_mosaic.host.arguments import parse_and_validate_args
    from megatron_mosaic.host.telemetry import Telemetry
    from tests.parity import vlm_script

    times: dict[str, Any] = {"steps_s": [], "reports_s": [], "marks_s": []}

    class TimedTelemetry(Telemetry):
        def __init__(self, runtime: Any, *, recorder: Any, **options: Any) -> None:
            super().__init__(runtime, recorder=recorder, **options)
            self.inside_s = 0.0
            for name in ("begin_step", "begin_task", "end_task", "close_step", "end_step"):
                setattr(recorder, name, self._timed(getattr(recorder, name)))

        def _timed(self, call: Any) -> Any:
            def timed(*arguments: Any, **named: Any) -> None:
                start_s = perf_counter()
                call(*arguments, **named)
                self.inside_s += perf_counter() - start_s

            return timed

        def __call__(self, *arguments: Any, **named: Any) -> Any:
            times["marks_s"].append(self.inside_s)
            self.inside_s = 0.0
            return super().__call__(*arguments, **named)

        def _report(self, iteration: int, *, last_s: float) -> None:
            start_s = perf_counter()
            super()._report(iteration, last_s=last_s)
            times["reports_s"].append(perf_counter() - start_s)
            times["steps_s"] += self._since_report_s

    training.Telemetry = TimedTelemetry
    sys.argv = ["script", *ARGUMENTS, *OPTIMIZERS["sgd"], *OPTIONS, "--train-iters", str(steps)]
    sys.argv += ["--mosaic-plan", plan_path]
    vlm_script.main(parse_and_validate_args, training.pretrain)
    return times


def measure(steps: int) -> dict[str, Any]:
    """Runs the training, and compares the two kinds of steps."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "plan.yaml"
        path.write_text(PLAN)
        ranks = run_ranks(_train, 2, str(path), steps, init=False, timeout_s=1800)
    # The first step is in no interval; then a recorded one, and so on in turn.
    warm = [rank["steps_s"][_WARM_UP:] for rank in ranks]
    first = _WARM_UP % 2
    recorded_s = median(step for rank in warm for step in rank[first::2])
    plain_s = median(step for rank in warm for step in rank[1 - first :: 2])
    marks_s = median(mark for rank in ranks for mark in rank["marks_s"][_WARM_UP + 1 :: 2])
    # The last rank has the most to do: it writes.
    report_s = median(ranks[-1]["reports_s"][_WARM_UP // 2 :])
    return {
        "steps": steps,
        "recorded_step_s": recorded_s,
        "plain_step_s": plain_s,
        "difference": recorded_s / plain_s - 1,
        "marks_s": marks_s,
        "report_s": report_s,
        "share_of_a_recorded_step": (marks_s + report_s) / plain_s,
        "share_at_log_interval": {
            str(interval): (marks_s + report_s) / (interval * plain_s) for interval in (1, 10, 100)
        },
    }


def table(results: Mapping[str, Any]) -> str:
    """The numbers as ``README.md`` has them, where a test looks for them."""
    rows = [
        ("a step without telemetry", f"{1e3 * results['plain_step_s']:.0f} ms"),
        ("a step that is recorded", f"{1e3 * results['recorded_step_s']:.0f} ms"),
        ("marks of a step", f"{1e3 * results['marks_s']:.2f} ms"),
        ("a report", f"{1e3 * results['report_s']:.2f} ms"),
    ]
    rows += [
        (f"cost at `--log-interval {interval}`", f"{share:.3%} of a step")
        for interval, share in results["share_at_log_interval"].items()
    ]
    where = results["machine"]
    return "\n".join(
        [
            f"| {where['processor']}, {where['cores']} cores, load average "
            f"{where['load_average']:.0f} | {where['date']} |",
            "| --- | --- |",
            *(f"| {name} | {value} |" for name, value in rows),
        ]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=120, help="training steps")
    path = write_results("telemetry_cost", measure(parser.parse_args(arguments).steps))
    print(f"{table(read_results('telemetry_cost'))}\nwrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
