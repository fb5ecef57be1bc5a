"""How a layout's loads are evened out: tokens over context-parallel ranks, items over replicas."""

from dataclasses import replace
from typing import Final

from megatron_mosaic.cost.cost_model import CostModel
from megatron_mosaic.cost.sizes import ParallelSizes
from megatron_mosaic.layout.attention import KeyExchange
from megatron_mosaic.layout.placement import LANGUAGE
from megatron_mosaic.model.workload import Workload
from megatron_mosaic.planner.candidate import EncoderChoice
from megatron_mosaic.planner.estimate import Estimator
from megatron_mosaic.planner.module_times import module_times
from megatron_mosaic.planner.problem import Problem
from megatron_mosaic.tokens.names import Method

COMPARED: Final[tuple[Method, ...]] = ("balanced", "local", "zigzag")
"""Assignments that a plan may have, the first of equals: contiguous tokens and LPT are no better
than one of these."""

EXCHANGES: Final[tuple[KeyExchange, ...]] = ("blocks", "all_gather")


def fastest_tokens(
    sizes: ParallelSizes, problem: Problem, cost_model: CostModel, *, samples: float
) -> tuple[Method, KeyExchange]:
    """Finds the assignment of tokens, and the way of keys, that is fastest with some sizes.

    Args:
        sizes: Of the language model, with context parallelism.
        problem: What is asked, and what is pinned.
        cost_model: What things cost.
        samples: Samples of a task of one replica.
    """
    pinned = problem.pins.modules.get(LANGUAGE, {})

    def time_s(tokens: Method, keys: KeyExchange) -> float:
        choice = replace(sizes, tokens=tokens, keys=keys)
        costs = cost_model.module(LANGUAGE, choice, samples=samples)
        upstream = cost_model.trains_before(LANGUAGE)
        return module_times(costs, trainable_upstream=upstream).total_s

    methods = (pinned["tokens"],) if "tokens" in pinned else COMPARED
    tokens = min(methods, key=lambda each: time_s(each, "auto"))
    ways = (pinned["keys"],) if "keys" in pinned else EXCHANGES
    return tokens, min(ways, key=lambda each: time_s(tokens, each))


def stock_tokens(sizes: ParallelSizes, workload: Workload | None) -> ParallelSizes:
    """The same sizes with tokens where Megatron has them."""
    if workload is None or sizes.cp == 1:
        return sizes
    return replace(sizes, tokens="zigzag", keys="auto")


def with_items(
    choice: EncoderChoice, language: ParallelSizes, estimator: Estimator, *, num_samples: int
) -> EncoderChoice:
    """An encoder with its items balanced over its replicas, if that is predicted to be faster.

    The slowest replica has less to do, but rows that were made on the ranks that take them may
    then have to travel.

    Args:
        choice: The encoder.
        language: Sizes of the language model.
        estimator: Knows the problem and the costs.
        num_samples: Samples of one of its tasks, of all replicas.
    """
    pinned = estimator.problem.pins.modules.get(choice.name, {}).get("items")
    if pinned != "balanced" and not estimator.cost_model.has_unlike_items(choice.name):
        return choice
    balanced = replace(choice, sizes=replace(choice.sizes, items="balanced"))
    if choice.sizes.dp == 1 or pinned is not None:
        return balanced if pinned == "balanced" else choice

    def time_s(each: EncoderChoice) -> float:
        costs = estimator.encoder_costs(each, num_samples)
        times = module_times(costs, trainable_upstream=False)
        ways = 1 if times.total_s <= times.forward_s else 2
        entry_s = estimator.entry_s(each, language, num_samples=num_samples)
        return times.total_s / each.sizes.pp + ways * entry_s

    return balanced if time_s(balanced) < time_s(choice) else choice
