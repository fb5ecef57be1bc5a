"""Work of an encoder's replicas on images of unlike sizes: in order, and dealt by cost.

python -m benchmarks.encoder_balance
"""

import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.machine import describe_machine, write_results
from megatron_mosaic.layout.item_costs import ItemCost
from megatron_mosaic.layout.items import balanced_items, items_in_order

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
    """Deals a microbatch, and compares with samples in order."""
    started_s = time.perf_counter()
    costs = [cost.flops(rows) for sample in samples for rows in sample]
    sizes = [len(sample) for sample in samples]
    owners = balanced_items(costs, dp=case.dp, samples=sizes)
    taken_s = time.perf_counter() - started_s
    return {
        "in_order": imbalance(costs, items_in_order(sizes, dp=case.dp), dp=case.dp),
        "balanced": imbalance(costs, owners, dp=case.dp),
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
    return {
        **case._asdict(),
        "in_order_worst": max(row["in_order"] for row in rows),
        "in_order_mean": statistics.mean(row["in_order"] for row in rows),
        "balanced_worst": max(row["balanced"] for row in rows),
        "balanced_mean": statistics.mean(row["balanced"] for row in rows),
        "bound_worst": max(row["bound"] for row in rows),
        "deal_median_s": statistics.median(row["deal_s"] for row in rows),
        "deal_worst_s": max(row["deal_s"] for row in rows),
    }
