"""What is in the way when nothing fits, and the smallest change that would."""

from collections.abc import Iterator
from dataclasses import replace
from math import inf

from megatron_mosaic.cost.cost_model import CostModel
from megatron_mosaic.errors import PlanError
from megatron_mosaic.planner.bounds import encoder_work_s, language_options
from megatron_mosaic.planner.candidate import Candidate
from megatron_mosaic.planner.estimate import Estimate, Estimator
from megatron_mosaic.planner.placements import every_candidate
from megatron_mosaic.planner.problem import QUOTA, SIZE_NAMES, Pins, Problem
from megatron_mosaic.planner.search import search

MOST_COMPARED = 2_000
"""Candidates that are compared for the one that misses the memory by least."""

TIME_LIMIT_S = 2.0
"""For finding out whether a change helps."""

MOST_TIMES = 64
"""Times as many GPUs as asked for that are tried at most."""


def refuse(problem: Problem, cost_model: CostModel) -> PlanError:
    """Returns the error for a problem of which no candidate fits.

    Args:
        problem: What is asked.
        cost_model: What things cost.
    """
    nearest = leanest(problem, cost_model)
    if nearest is None:
        return PlanError(
            f"model {problem.model.name}: gpus={problem.num_gpus} with global-batch-size="
            f"{problem.global_batch_size}{_pinned(problem.pins)} must allow a legal layout; "
            f"{_advice(problem)}"
        )
    hosted, terms = max(nearest.memory.items(), key=lambda item: sum(item[1].values()))
    term = max(terms, key=lambda name: terms[name])
    where = " and ".join(f"{module} stage {stage}" for module, stage in hosted)
    return PlanError(
        f"model {problem.model.name}: memory={_gib(nearest.peak_bytes)} on a rank of {where} must "
        f"be <= {_gib(problem.memory_bytes)} of cluster {problem.cluster.name}, and this is the "
        f"leanest layout of {problem.num_gpus} GPUs; {term}={_gib(terms[term])} is in the way; "
        f"{_advice(problem)}"
    )


def leanest(problem: Problem, cost_model: CostModel) -> Estimate | None:
    """The candidate that needs least memory, of the most promising; None if none is legal."""
    boundless = replace(problem, reserved_bytes=-inf)
    estimator = Estimator(boundless, cost_model)
    best: Estimate | None = None
    for candidate in _lean_candidates(estimator):
        estimate = estimator.estimate(candidate)
        if estimate is not None and (best is None or estimate.peak_bytes < best.peak_bytes):
            best = estimate
    return best


def _lean_candidates(estimator: Estimator) -> Iterator[Candidate]:
    problem, count = estimator.problem, 0
    options = language_options(estimator, encoder_work_s=encoder_work_s(estimator))
    for option in sorted(options, key=lambda o: (o.average_bytes, o.micro_batch_size)):
        for number, candidate in enumerate(
            every_candidate(problem, option.sizes, option.micro_batch_size)
        ):
            if number < MOST_COMPARED // 20:
                yield candidate
                count += 1
        if count >= MOST_COMPARED:
            return


def _advice(problem: Problem) -> str:
    """The smallest change that makes something fit."""
    for name, pins in _fewer_pins(problem.pins):
        if _fits(replace(problem, pins=pins)):
            return f"remove the pinned {name}, or choose another value"
    num_nodes = _fewest_nodes(problem)
    if num_nodes:
        return f"use {num_nodes * problem.cluster.gpus_per_node} GPUs"
    return f"use a smaller model, shorter sequences, or more than {problem.num_gpus} GPUs"


def _fewest_nodes(problem: Problem) -> int | None:
    """Nodes on which something fits: doubled until it does, then halved back between the two."""
    per_node, factor = problem.cluster.gpus_per_node, 2
    nodes = -(-problem.num_gpus // per_node)

    def fits(count: int) -> bool:
        larger = replace(problem.cluster, num_nodes=count)
        return _fits(replace(problem, cluster=larger, num_gpus=count * per_node))

    last = problem.cluster.tiers[-1]
    while factor <= MOST_TIMES:
        if last.span is not None and nodes * factor * per_node > last.span:
            return None
        if fits(nodes * factor):
            break
        factor *= 2
    else:
        return None
    low, high = nodes * factor // 2, nodes * factor
    while high - low > max(1, nodes * factor // 8):
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high


def _fits(problem: Problem) -> bool:
    cost_model = CostModel(problem.model, problem.cluster, problem.settings)
    return bool(search(problem, cost_model, top=1, time_limit_s=TIME_LIMIT_S, first=True).best)


def _fewer_pins(pins: Pins) -> Iterator[tuple[str, Pins]]:
    """Yields the name of every pinned field, with the other ones alone."""
    for field in ("micro_batch_size", "kind", "encoder_group", "placement"):
        if getattr(pins, field) is not None:
            shown = {"kind": "schedule.kind", "encoder_group": "schedule.encoder_group"}
            yield shown.get(field, field), replace(pins, **{field: None})
    for name in pins.quotas:
        rest = {other: sms for other, sms in pins.quotas.items() if other != name}
        yield f"{name}.{QUOTA}", replace(pins, quotas=rest)
    for name, sizes in pins.modules.items():
        for size in sizes:
            rest = {key: value for key, value in sizes.items() if key != size}
            yield (
                f"{name}.{SIZE_NAMES.get(size, size)}",
                replace(pins, modules={**pins.modules, name: rest}),
            )


def _pinned(pins: Pins) -> str:
    names = [name for name, _ in _fewer_pins(pins)]
    return f" and pinned {', '.join(names)}" if names else ""


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.1f} GiB"
