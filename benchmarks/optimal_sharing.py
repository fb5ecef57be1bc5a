"""The fastest of all layouts whose two modules run at the same time: no search, one by one."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

from megatron_mosaic.cost.cost_model import CostModel
from megatron_mosaic.planner.candidate import Candidate
from megatron_mosaic.planner.estimate import Estimator
from megatron_mosaic.planner.filling import ordered
from megatron_mosaic.planner.legal_sizes import divisors, language_sizes
from megatron_mosaic.planner.placements import every_candidate
from megatron_mosaic.planner.problem import Problem
from megatron_mosaic.planner.quotas import Quotas, is_legal
from megatron_mosaic.planner.simulated import Simulated, plan_under, simulated


def fastest_shared(problem: Problem) -> tuple[Simulated | None, int]:
    """Finds the fastest plan, and counts those that it was compared with.

    Args:
        problem: What is asked, of a model of two modules; all sizes of its space are tried.
    """
    cost_model = CostModel(problem.model, problem.cluster, problem.settings)
    best, count = None, 0
    for first in _layouts(problem, cost_model):
        for candidate in _candidates(first, problem):
            entry = ordered(first, candidate, first.layers_per_stage, problem, cost_model)
            count += 1
            if entry is not None and (best is None or entry.step_s < best.step_s):
                best = entry
    return best, count


def _layouts(problem: Problem, cost_model: CostModel) -> Iterator[Simulated]:
    """Yields every layout whose modules share ranks, under one of its schedules."""
    estimator, seen = Estimator(problem, cost_model), set()
    # Before Blackwell Megatron has only such modules launch in more than one queue.
    whole = (problem.cluster.gpu.compute_capability or (0, 0)) < (10, 0)
    for micro_batch_size in problem.space.micro_batch_sizes:
        for sizes in language_sizes(problem, micro_batch_size=micro_batch_size):
            for candidate in every_candidate(problem, sizes, micro_batch_size):
                key = replace(candidate, encoder_group=1)
                shared = any(encoder.shares for encoder in candidate.encoders)
                sizes_of_all = (candidate.language, *(it.sizes for it in candidate.encoders))
                if whole and any(its.tp * its.cp > 1 for its in sizes_of_all):
                    continue
                if candidate.kind != "colocated" or not shared or key in seen:
                    continue
                estimate = estimator.estimate(candidate)
                if estimate is not None:
                    seen.add(key)
                    yield simulated(estimate, problem, cost_model)


def _candidates(first: Simulated, problem: Problem) -> Iterator[Candidate]:
    """Yields a layout under all groups, a step ahead or not, and all quotas."""
    candidate, gpu = replace(first.candidate, kind="concurrent"), problem.cluster.gpu
    samples = candidate.micro_batch_size * candidate.language.dp
    (encoder,) = candidate.encoders
    frozen = problem.model.modules[encoder.name].trainable == ()
    plan = plan_under(candidate, first.layers_per_stage, problem)
    sms = (None, *range(1, gpu.num_sms))
    choices: list[Quotas] = [
        tuple((name, quota) for name, quota in zip(plan.modules, pair, strict=True) if quota)
        for pair in product(sms, repeat=2)
        if None in pair or sum(filter(None, pair)) == gpu.num_sms
    ]
    legal = [quotas for quotas in choices if is_legal(quotas, plan, problem)]
    for group in divisors(first.estimate.num_microbatches):
        for ahead in (False, True) if frozen else (False,):
            for quotas in legal if group * samples >= encoder.sizes.dp else ():
                yield replace(candidate, encoder_group=group, ahead=ahead, quotas=quotas)
