"""Work of an encoder's replicas on images of unlike sizes: in order, and dealt by cost.

python -m benchmarks.encoder_balance
"""

import statistics
import tempfile
import time
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from benchmarks.machine import write_results
from benchmarks.schedule_fidelity import predicted_s
from benchmarks.timed_plans import MICRO_BATCH_SIZE, WORLD_SIZE, TimedPlan, place, timed
from benchmarks.timed_run import Counts, StepImages, TimedEngine, hurry
from megatron_mosaic.engine.trace import HostClock, TaskTrace
from megatron_mosaic.layout.item_costs import ItemCost
from megatron_mosaic.layout.items import balanced_items, items_in_order
from megatron_mosaic.layout.placement import ItemOrder
from megatron_mosaic.layout.rows import Interval
from megatron_mosaic.schedule.measured import read_trace
from megatron_mosaic.schedule.simulate import PassTimes
from tests.ranks import run_ranks

SEEDS = range(8)
MICROBATCHES = 16
"""Microbatches of each seed."""

MOST_IMAGES = 10
TOKENS = (256, 4096)
MEDIAN_TOKENS, SIGMA = 576, 0.9
"""Of the lognormal distribution of an image's tokens before it is clipped; ours. 576 is an image
of 336 x 336 pixels in patches of 14, the input of LLaVA-1.5."""

# Source: config.json of google/siglip-so400m-patch14-384 on Hugging Face, the vision_config.
LAYERS, HIDDEN, FFN = 27, 1152, 4304

GOAL = 1.03
SAMPLES_PER_REPLICA = 4
"""Samples of a microbatch for each replica of the encoder at which the goal holds."""


class Case(NamedTuple):
    """A microbatch of so many samples for each of so many replicas."""

    dp: int
    samples_per_replica: int


CASES = [Case(dp, samples) for dp in (8, 64) for samples in (1, 2, 4, 8)]


def siglip_cost() -> ItemCost:
    """Operations of a layer: 8 h^2 + 4 h f for each token in linear layers, 4 h for each pair."""
    return ItemCost(
        row_flops=float(LAYERS * (8 * HIDDEN**2 + 4 * HIDDEN * FFN)),
        pair_flops=float(LAYERS * 4 * HIDDEN),
    )


def draw_samples(generator: np.random.Generator, num_samples: int) -> list[list[int]]:
    """Draws the tokens of every image of some samples.

    k images are as likely as 1 / k, up to ten. Tokens are lognormal, clipped to their range, and a
    multiple of four, as four patches often become one row.
    """
    chances = 1 / np.arange(1, MOST_IMAGES + 1)
    numbers = 1 + generator.choice(MOST_IMAGES, size=num_samples, p=chances / chances.sum())
    sizes = np.exp(generator.normal(np.log(MEDIAN_TOKENS), SIGMA, size=int(numbers.sum())))
    tokens = iter((4 * np.round(sizes.clip(*TOKENS) / 4)).astype(int).tolist())
    return [[next(tokens) for _ in range(number)] for number in numbers.tolist()]


def imbalance(costs: Sequence[float], owners: Sequence[int], *, dp: int) -> float:
    """Work of the slowest replica over that of the mean one."""
    loads = np.bincount(owners, weights=costs, minlength=dp)
    return float(loads.max() / loads.mean())


def deal(case: Case, samples: Sequence[Sequence[int]], cost: ItemCost) -> dict[str, float]:
    """Deals a microbatch, and compares with samples in order, and with whole samples dealt."""
    started_s = time.perf_counter()
    costs = [cost.flops(rows) for sample in samples for rows in sample]
    sizes = [len(sample) for sample in samples]
    owners = balanced_items(costs, dp=case.dp, samples=sizes)
    taken_s = time.perf_counter() - started_s
    whole = [sum(map(cost.flops, sample)) for sample in samples]
    return {
        "in_order": imbalance(costs, items_in_order(sizes, dp=case.dp), dp=case.dp),
        "balanced": imbalance(costs, owners, dp=case.dp),
        "whole_samples": imbalance(whole, balanced_items(whole, dp=case.dp), dp=case.dp),
        # No replica has less to do than the largest image.
        "bound": max(1.0, max(costs) * case.dp / sum(costs)),
        "deal_s": taken_s,
    }


def measure_case(case: Case) -> dict[str, Any]:
    """Measures all microbatches of a case."""
    cost = siglip_cost()
    rows = []
    for seed in SEEDS:
        generator = np.random.default_rng((seed, *case))
        for _ in range(MICROBATCHES):
            samples = draw_samples(generator, case.dp * case.samples_per_replica)
            rows.append(deal(case, samples, cost))
    worst = {f"{key}_worst": max(row[key] for row in rows) for key in rows[0]}
    middle = {f"{key}_median": statistics.median(row[key] for row in rows) for key in rows[0]}
    return {**case._asdict(), "microbatches": len(rows), **worst, **middle}


class RealStep(NamedTuple):
    """A step that real ranks run: eight replicas of the encoder on the language model's ranks."""

    seed: int
    items: ItemOrder


NUM_MICROBATCHES = 2
ENCODER_S = 0.1
"""Forward time of a replica's mean share of a step; backward takes twice that."""
LANGUAGE_S = PassTimes(0.02, 0.04)
REAL_SEEDS = range(4)
COUNTS = Counts(without_waits=2, with_waits=3)
TIMEOUT_S = 300.0


def timed_plan(slowest_s: float) -> TimedPlan:
    """The plan of a real step; its simulation takes the slowest replica for all."""
    ranks = range(WORLD_SIZE)
    return timed(
        "encoder balance",
        "colocated",
        [place("vision", ranks, dp=WORLD_SIZE), place("language", ranks, dp=WORLD_SIZE)],
        num_microbatches=NUM_MICROBATCHES,
        waits_s={"vision": PassTimes(slowest_s, 2 * slowest_s), "language": LANGUAGE_S},
        group=NUM_MICROBATCHES,
    )


def step_images(step: RealStep) -> StepImages:
    """Draws the images of a step, and says which replica takes how long for its own."""
    task, cost = tuple(range(NUM_MICROBATCHES)), siglip_cost()
    num_samples = NUM_MICROBATCHES * MICRO_BATCH_SIZE * WORLD_SIZE
    samples = draw_samples(np.random.default_rng(step.seed), num_samples)
    costs = [cost.flops(rows) for sample in samples for rows in sample]
    sizes = [len(sample) for sample in samples]
    owners = items_in_order(sizes, dp=WORLD_SIZE)
    if step.items == "balanced":
        owners = balanced_items(costs, dp=WORLD_SIZE, samples=sizes)
    loads = np.bincount(owners, weights=costs, minlength=WORLD_SIZE)
    by_item = iter(owners)
    return StepImages(
        module="vision",
        samples=tuple(_runs(sample) for sample in samples),
        owners={task: tuple(tuple(next(by_item) for _ in sample) for sample in samples)},
        works_s={
            dp: {task: ENCODER_S * load} for dp, load in enumerate((loads / loads.mean()).tolist())
        },
    )


def _runs(sample: Sequence[int]) -> tuple[Interval, ...]:
    """Rows of each image, one for 64 tokens: what a transfer carries is to take no time."""
    stops = list(accumulate(-(-tokens // 64) for tokens in sample))
    return tuple(Interval(*bounds) for bounds in zip([0, *stops], stops, strict=False))


def run_steps(rank: int, steps: Sequence[RealStep], folder: str) -> None:
    """Runs every step several times over. Called on every rank."""
    hurry()
    for number, step in enumerate(steps):
        images = step_images(step)
        with TaskTrace(Path(folder) / str(number), rank=rank, clock=HostClock()) as trace:
            engine = TimedEngine(timed_plan(ENCODER_S), rank=rank, trace=trace, images=images)
            for count in range(sum(COUNTS)):
                dist.barrier()
                engine.step(waits=count >= COUNTS.without_waits)
        dist.barrier()
        engine.destroy()


def measure_steps() -> list[dict[str, Any]]:
    """Runs the steps on real ranks, and puts them beside their simulation."""
    steps = [RealStep(seed, items) for seed in REAL_SEEDS for items in get_args(ItemOrder)]
    with tempfile.TemporaryDirectory(prefix="trace-") as folder:
        run_ranks(run_steps, WORLD_SIZE, steps, folder, timeout_s=TIMEOUT_S)
        seen_s = [
            [each.makespan_s for each in read_trace(Path(folder) / str(number))]
            for number in range(len(steps))
        ]
    return [_beside_simulation(step, each) for step, each in zip(steps, seen_s, strict=True)]


def _beside_simulation(step: RealStep, seen_s: Sequence[float]) -> dict[str, Any]:
    works_s = [work_s for tasks in step_images(step).works_s.values() for work_s in tasks.values()]
    return {
        **step._asdict(),
        "imbalance": max(works_s) / ENCODER_S,
        "predicted_s": predicted_s(timed_plan(max(works_s))),
        "measured_s": statistics.median(seen_s[COUNTS.without_waits :]),
        "steps_s": seen_s[COUNTS.without_waits :],
    }


def gains(steps: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """How much shorter each step is with balanced items, predicted and measured."""
    in_order, balanced = (
        [step for step in steps if step["items"] == items] for items in get_args(ItemOrder)
    )
    return [
        {
            "seed": first["seed"],
            "predicted": first["predicted_s"] / second["predicted_s"],
            "measured": first["measured_s"] / second["measured_s"],
        }
        for first, second in zip(in_order, balanced, strict=True)
    ]


def print_tables(cases: Sequence[dict[str, Any]], steps: Sequence[dict[str, Any]]) -> None:
    """Prints the work of replicas, and the steps."""
    console = Console(width=120)
    table = Table(title="Work of the slowest replica over the mean, worst of all microbatches")
    for name in ("DP", "samples/replica", "in order", "whole samples", "items", "bound", "ms"):
        table.add_column(name, justify="right")
    for case in cases:
        ratios = (case[f"{key}_worst"] for key in ("in_order", "whole_samples", "balanced"))
        table.add_row(
            str(case["dp"]),
            str(case["samples_per_replica"]),
            *(f"{ratio:.3f}" for ratio in ratios),
            f"{case['bound_worst']:.3f}",
            f"{1e3 * case['deal_s_median']:.2f}",
        )
    console.print(table)
    for gain in gains(steps):
        console.print(gain)


def main() -> None:
    """Measures, prints and writes."""
    cases = [measure_case(case) for case in CASES]
    steps = measure_steps()
    print_tables(cases, steps)
    results = {
        "generator": draw_samples.__doc__,
        "seeds": list(SEEDS),
        "cases": cases,
        "steps": steps,
        "gains": gains(steps),
    }
    print(write_results("encoder_balance", results))


if __name__ == "__main__":
    main()
