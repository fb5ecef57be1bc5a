"""How long the planner takes, and how that grows with GPUs and modules.

python -m benchmarks.planner_speed [--quick]

Every search runs in a process of its own, on one core. Where the gap is 0 it has ended at the
optimum of its space; otherwise the command's time limit has ended it. Memory is the largest that
the process had.
"""

import argparse
import json
import resource
import subprocess
import sys
from time import perf_counter
from typing import Any

from benchmarks.machine import write_results

# Model, GPUs, samples of a step.
SEARCHES = (
    ("llama-3-70b", 64, 256),
    ("llama-3-70b", 512, 1024),
    ("llama-3-70b", 4096, 4096),
    ("llama-3-70b", 16384, 4096),
    ("llava-1.5-7b", 512, 1024),
    ("qwen2.5-vl-72b", 512, 1024),
    ("qwen2.5-vl-72b", 16384, 4096),
    ("vit-22b-gpt-175b", 512, 512),
    ("vit-22b-gpt-175b", 3072, 1536),
    ("cornstarch-l", 64, 256),
    ("cornstarch-l", 512, 512),
    ("cornstarch-l", 4096, 2048),
    ("cornstarch-l", 16384, 4096),
    ("cornstarch-m", 512, 512),
    ("ofasys-like", 64, 256),
    ("ofasys-like", 512, 1024),
    ("imagebind-like", 16, 64),
    ("imagebind-like", 64, 256),
    ("deepseek-v3", 1024, 4096),
)
QUICK = (("llava-1.5-7b", 64, 128), ("cornstarch-l", 512, 512))
LIMIT_S = 20.0


def measure(name: str, num_gpus: int, batch: int) -> dict[str, Any]:
    """Plans once in this process."""
    from megatron_mosaic.cluster.shipped import load_cluster
    from megatron_mosaic.cost.cost_model import CostModel
    from megatron_mosaic.model.shipped import load_model
    from megatron_mosaic.planner.estimate import Estimator
    from megatron_mosaic.planner.planner import make_plan
    from megatron_mosaic.planner.problem import Problem
    from megatron_mosaic.planner.simulated import simulated

    model, cluster = load_model(name), load_cluster("h100", num_gpus=num_gpus)
    problem = Problem(model=model, cluster=cluster, num_gpus=num_gpus, global_batch_size=batch)
    start = perf_counter()
    answer = make_plan(problem, time_limit_s=LIMIT_S)
    search_s = perf_counter() - start
    cost_model = CostModel(model, cluster, problem.settings)
    estimator, candidate = Estimator(problem, cost_model), answer.choice.estimate.candidate
    estimator.estimate(candidate)  # what a search has asked before
    start, repeats = perf_counter(), 200
    for _ in range(repeats):
        estimate = estimator.estimate(candidate)
        assert estimate is not None
        assert estimate.step_s
    estimate_s = (perf_counter() - start) / repeats
    start = perf_counter()
    simulated(answer.choice.estimate, problem, cost_model)
    return {
        "model": name,
        "num_modules": len(model.modules),
        "num_gpus": num_gpus,
        "global_batch_size": batch,
        "search_s": search_s,
        "estimate_s": estimate_s,
        "simulation_s": perf_counter() - start,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "language_layouts": answer.found.num_language,
        "estimates": answer.found.num_estimates,
        "gap": answer.found.gap,
        "placement": candidate.placement,
        "gain": None if answer.baseline is None else answer.baseline.step_s / answer.choice.step_s,
    }


def apart(name: str, num_gpus: int, batch: int) -> dict[str, Any]:
    """Plans once in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.planner_speed", "--one", name, str(num_gpus)]
    done = subprocess.run(
        [*command, str(batch)], capture_output=True, text=True, check=True, timeout=600
    )
    return json.loads(done.stdout)


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two searches, nothing written")
    parser.add_argument("--one", nargs=3, metavar=("MODEL", "GPUS", "BATCH"))
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.one[0], int(args.one[1]), int(args.one[2]))))
        return
    print(
        "model              modules   GPUs  search s  estimate ms  simulated ms   MiB  gap   gain"
    )
    rows = []
    for search in QUICK if args.quick else SEARCHES:
        row = apart(*search)
        rows.append(row)
        gain = "" if row["gain"] is None else f"{row['gain']:.3f}x {row['placement']}"
        print(
            f"{row['model']:<18} {row['num_modules']:>7}  {row['num_gpus']:>5}  "
            f"{row['search_s']:>8.2f}  {row['estimate_s'] * 1e3:>11.3f}  "
            f"{row['simulation_s'] * 1e3:>12.2f}  {row['peak_bytes'] / 2**20:>4.0f}  "
            f"{row['gap']:.1%}  {gain}",
            flush=True,
        )
    if not args.quick:
        print(write_results("planner_speed", {"searches": rows}))


if __name__ == "__main__":
    main()
