"""What the planner expects of modules that share GPUs, for the model families of Mosaic's paper.

python -m benchmarks.sharing_planner [--quick] [--jobs N]

Every row is planned in a process of its own, whose processor time is given: with everything that
the planner knows; without modules that run at the same time (``temporal``); with one layout for all
modules (``homogeneous``). Families of two modules on few GPUs are compared with the best of all
layouts, groups and quotas with the largest microbatch (``optimum``), and rows of ``WRONG_GPUS``
with what plans are worth that wrong curves have chosen. Nothing is computed again: models of this
size have the memory. All numbers are predictions.
"""

import argparse
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from time import process_time
from typing import TYPE_CHECKING, Any, NamedTuple

from benchmarks.machine import write_results

if TYPE_CHECKING:
    from megatron_mosaic.cluster.spec import Cluster, SharingCurves
    from megatron_mosaic.planner.multiplexing import Multiplexing
    from megatron_mosaic.planner.planner import Answer
    from megatron_mosaic.planner.problem import Problem
    from megatron_mosaic.planner.simulated import Simulated


class Family(NamedTuple):
    """One of the paper's families, as it is planned for.

    Args:
        model: Name of the model file.
        global_batch_size: Samples of a step, whatever the GPUs.
        micro_batch_sizes: Samples of a microbatch; models as small as these run many at a time.
    """

    model: str
    global_batch_size: int
    micro_batch_sizes: tuple[int, ...]


FAMILIES = (
    Family("clip-vit-l-14", 1024, (16, 64, 256)),
    Family("qwen3-vl-2b", 128, (2, 4, 8)),
    Family("unified-io-2-like", 256, (4, 8, 16)),
    Family("imagebind-like", 512, (16, 64, 128)),
    Family("ofasys-like", 256, (4, 8, 16)),
)
GPUS = (1, 2, 4, 8, 16)
BLACKWELL_GPUS = 8
"""On B200s tensor-parallel modules may share GPUs, too."""

OPTIMUM_GPUS = 1
"""GPUs up to which all layouts of two-module families are compared."""

WRONG_GPUS = (1,)
"""GPUs of rows that are planned with wrong curves, too."""

# Curves that are wrong: none of what the planner takes for the shares of a GPU, or too much of it.
PREDICTORS = ("no interference", "knee at 40 %", "knee at 75 %", "all in proportion")


def measure(name: str, cluster_name: str, num_gpus: int) -> dict[str, Any]:
    """Plans a row in this process."""
    from megatron_mosaic.planner.multiplexing import multiplexed
    from megatron_mosaic.planner.planner import make_plan

    family = next(family for family in FAMILIES if family.model == name)
    asked = _problem(family, cluster_name, num_gpus)
    start = process_time()
    serial = make_plan(replace(asked, space=replace(asked.space, multiplexing=False)))
    temporal_search_s = process_time() - start
    found = multiplexed(serial.best, asked, serial.cost_model)
    search_s = process_time() - start
    choice = found.best if found.best is not None and found.pays else serial.choice
    row = {
        "model": name,
        "cluster": cluster_name,
        "num_gpus": num_gpus,
        "global_batch_size": family.global_batch_size,
        "num_modules": len(asked.model.modules),
        "step_s": choice.step_s,
        "temporal_s": serial.choice.step_s,
        "homogeneous_s": None if serial.baseline is None else serial.baseline.step_s,
        "temporal_search_s": temporal_search_s,
        "search_s": search_s,
        "placement": choice.candidate.placement,
        "data_parallel_sizes": {
            name: placement.data_parallel_size for name, placement in choice.plan.modules.items()
        },
        **_what_sharing_does(found),
    }
    if num_gpus in WRONG_GPUS:
        row["predictors"] = _with_wrong_curves(asked, serial, choice)
    if num_gpus <= OPTIMUM_GPUS and row["num_modules"] == 2:
        row["optimum"] = _optimum(asked)
    return row


def _problem(family: Family, cluster_name: str, num_gpus: int) -> "Problem":
    from megatron_mosaic.cluster.shipped import load_cluster
    from megatron_mosaic.model.shipped import load_model
    from megatron_mosaic.planner.problem import Problem, Space

    return Problem(
        model=load_model(family.model),
        cluster=load_cluster(cluster_name, num_gpus=num_gpus),
        num_gpus=num_gpus,
        global_batch_size=family.global_batch_size,
        space=Space(micro_batch_sizes=family.micro_batch_sizes, recompute=(None,)),
    )


def _what_sharing_does(found: "Multiplexing") -> dict[str, Any]:
    """The best plan with lanes, whether it is chosen or not."""
    best = found.best
    return {
        "pays": found.pays,
        "gain": found.gain,
        "examined": found.num_examined,
        "quotas": None if best is None else dict(best.candidate.quotas),
        "encoder_group": None if best is None else best.candidate.encoder_group,
        "ahead": None if best is None else best.candidate.ahead,
        "micro_batch_size": None if best is None else best.candidate.micro_batch_size,
    }


def _with_wrong_curves(asked: "Problem", serial: "Answer", right: "Simulated") -> dict[str, float]:
    """Share by which steps are longer whose plans were chosen with wrong curves."""
    from megatron_mosaic.cost.cost_model import CostModel
    from megatron_mosaic.planner.multiplexing import multiplexed

    losses = {}
    for name in PREDICTORS:
        wrong = replace(asked, cluster=_with_curves(asked.cluster, name))
        found = multiplexed(
            serial.best, wrong, CostModel(wrong.model, wrong.cluster, wrong.settings)
        )
        chosen = found.best if found.best is not None and found.pays else serial.choice
        losses[name] = serial.cost_model.estimate(chosen.plan).step_s / right.step_s - 1
    return losses


def _with_curves(cluster: "Cluster", name: str) -> "Cluster":
    curves = cluster.gpu.sharing
    assert curves is not None, f"gpu {cluster.gpu.name} must have sharing curves"
    return replace(cluster, gpu=replace(cluster.gpu, sharing=_curves(curves, name)))


def _curves(curves: "SharingCurves", name: str) -> "SharingCurves":
    match name:
        case "no interference":
            return replace(curves, interference=0.0)
        case "knee at 40 %":
            return replace(curves, bandwidth_knee=0.4)
        case "knee at 75 %":
            return replace(curves, bandwidth_knee=0.75)
        case "all in proportion":
            return replace(curves, bandwidth_knee=1.0, interference=0.0)
    raise AssertionError(name)


def _optimum(asked: "Problem") -> dict[str, Any]:
    """The best of all layouts, groups and quotas, one after the other, and the planner's best."""
    from benchmarks.optimal_sharing import fastest_shared
    from megatron_mosaic.cost.cost_model import CostModel
    from megatron_mosaic.planner.multiplexing import multiplexed

    largest = asked.space.micro_batch_sizes[-1:]
    asked = replace(asked, space=replace(asked.space, micro_batch_sizes=largest))
    start = process_time()
    best, count = fastest_shared(asked)
    search_s = process_time() - start
    found = multiplexed([], asked, CostModel(asked.model, asked.cluster, asked.settings))
    return {
        "step_s": None if best is None else best.step_s,
        "planner_s": None if found.best is None else found.best.step_s,
        "plans": count,
        "examined": found.num_examined,
        "search_s": search_s,
    }


def apart(name: str, cluster: str, num_gpus: int) -> dict[str, Any]:
    """Plans a row in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.sharing_planner", "--one", name, cluster]
    done = subprocess.run(
        [*command, str(num_gpus)], capture_output=True, text=True, check=True, timeout=1800
    )
    return json.loads(done.stdout)


def main() -> None:
    """Plans, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one row, nothing written")
    parser.add_argument("--jobs", type=int, default=1, help="rows at the same time")
    parser.add_argument("--one", nargs=3, metavar=("MODEL", "CLUSTER", "GPUS"))
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.one[0], args.one[1], int(args.one[2]))))
        return
    asked = [(family.model, "h200", count) for family in FAMILIES for count in GPUS]
    asked += [(family.model, "b200", BLACKWELL_GPUS) for family in FAMILIES]
    rows = []
    with ThreadPoolExecutor(max_workers=args.jobs) as jobs:
        for row in jobs.map(lambda search: apart(*search), asked[:1] if args.quick else asked):
            rows.append(row)
            print(_line(row), flush=True)
    if not args.quick:
        print(write_results("sharing_planner", {"rows": rows}))


def _line(row: dict[str, Any]) -> str:
    gain = "" if row["gain"] is None else f"{row['gain']:+.1%}"
    return (
        f"{row['model']:<18} {row['num_gpus']:>3} {row['cluster']}  {row['step_s']:8.4f} s  "
        f"temporal {row['temporal_s']:8.4f} s  homogeneous {row['homogeneous_s'] or 0:8.4f} s  "
        f"{gain:>6} {'shared' if row['pays'] else 'alone '} {row['quotas']} "
        f"{row['search_s']:.1f} s"
    )


if __name__ == "__main__":
    main()
