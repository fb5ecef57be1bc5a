"""Times below which no candidate can be, from the costs of modules alone."""

from dataclasses import dataclass, replace

from megatron_mosaic.cost.costs import ModuleCosts, PartRun
from megatron_mosaic.cost.sizes import ParallelSizes
from megatron_mosaic.layout.attention import KeyExchange
from megatron_mosaic.layout.placement import LANGUAGE
from megatron_mosaic.planner.balance import fastest_tokens
from megatron_mosaic.planner.estimate import Estimator
from megatron_mosaic.planner.legal_sizes import context_sizes, language_sizes, tensor_sizes
from megatron_mosaic.planner.module_times import ModuleTimes, module_times
from megatron_mosaic.tokens.names import Method


@dataclass(frozen=True, kw_only=True, slots=True)
class LanguageOption:
    """Sizes of the language model, and what follows from them whatever the rest is.

    Args:
        sizes: Its sizes.
        micro_batch_size: Samples of one microbatch of one replica.
        num_microbatches: Of a step.
        bound_s: No candidate with these sizes is faster.
        forward_share: Share of a stage's time that is forward, at most.
        average_bytes: The fullest stage holds at least this.
    """

    sizes: ParallelSizes
    micro_batch_size: int
    num_microbatches: int
    bound_s: float
    forward_share: float
    average_bytes: float


def pipeline_bound_s(
    *,
    total_s: float,
    slowest_s: float,
    forward_share: float,
    num_stages: int,
    num_microbatches: int,
) -> float:
    """Time of 1F1B, however its layers are split.

    The slowest stage works for all microbatches. Until its first backward pass ends a microbatch
    goes through the whole pipeline, and until its last one has gone back another one; in that
    time it does forward passes for no more microbatches than there are stages.

    Args:
        total_s: A microbatch in all stages.
        slowest_s: In the slowest stage, at least.
        forward_share: Share of a stage's time that is forward, at most.
        num_stages: Stages.
        num_microbatches: Microbatches.
    """
    early = min(num_stages, num_microbatches) - 1
    steady = num_microbatches - 1 - early * forward_share
    return max(num_microbatches * slowest_s, total_s + max(steady, 0.0) * slowest_s)


def encoder_work_s(estimator: Estimator) -> float:
    """GPU-seconds that all encoders take in a step, at their cheapest.

    Larger tasks never take longer for each of their samples, so the whole batch as one task on
    one replica takes least.
    """
    problem, total_s = estimator.problem, 0.0
    for name in problem.encoders:
        module, cheapest_s = problem.model.modules[name], []
        for tp in tensor_sizes(module, problem):
            for cp in context_sizes(module, problem, tp=tp):
                for recompute in problem.space.recompute:
                    sizes = ParallelSizes(tp=tp, cp=cp, etp=tp, recompute=recompute)
                    costs = estimator.cost_model.module(
                        name, sizes, samples=problem.global_batch_size
                    )
                    times = module_times(costs, trainable_upstream=False)
                    cheapest_s.append(times.total_s * tp * cp)
        total_s += min(cheapest_s, default=0.0)
    return total_s


def language_options(estimator: Estimator, *, encoder_work_s: float) -> list[LanguageOption]:
    """All sizes of the language model that may fit the memory, the most promising first.

    Args:
        estimator: Knows the problem and the costs.
        encoder_work_s: GPU-seconds of all encoders in a step, at least.
    """
    problem = estimator.problem
    sizes_of_microbatch = problem.space.micro_batch_sizes
    if problem.pins.micro_batch_size is not None:
        sizes_of_microbatch = (problem.pins.micro_batch_size,)
    times: dict[tuple[object, ...], ModuleTimes] = {}
    assigned: dict[tuple[int, int], tuple[Method, KeyExchange]] = {}
    options = []
    for micro_batch_size in sizes_of_microbatch:
        for sizes in language_sizes(problem, micro_batch_size=micro_batch_size):
            key = (sizes.tp, sizes.cp, sizes.ep, sizes.etp, sizes.sequence_parallel)
            key = (*key, sizes.recompute, micro_batch_size)
            if problem.workload is not None and sizes.cp > 1:
                # What is recomputed, and how experts are split, matters little to this choice.
                at = (sizes.tp, sizes.cp)
                if at not in assigned:
                    assigned[at] = fastest_tokens(
                        sizes, problem, estimator.cost_model, samples=micro_batch_size
                    )
                tokens, keys = assigned[at]
                sizes = replace(sizes, tokens=tokens, keys=keys)
            costs = estimator.cost_model.module(LANGUAGE, sizes, samples=micro_batch_size)
            if key not in times:
                upstream = estimator.cost_model.trains_before(LANGUAGE)
                times[key] = module_times(costs, trainable_upstream=upstream)
            average_bytes = _average_bytes(estimator, costs)
            if average_bytes > estimator.limit_bytes:
                continue
            num_microbatches = problem.num_microbatches(
                micro_batch_size=micro_batch_size, dp=sizes.dp
            )
            bound_s = _bound_s(
                times[key], sizes, num_microbatches, encoder_work_s, num_gpus=problem.num_gpus
            )
            options.append(
                LanguageOption(
                    sizes=sizes,
                    micro_batch_size=micro_batch_size,
                    num_microbatches=num_microbatches,
                    bound_s=bound_s,
                    forward_share=times[key].forward_share,
                    average_bytes=average_bytes,
                )
            )
    return sorted(options, key=lambda option: option.bound_s)  # stable


def _bound_s(
    times: ModuleTimes,
    sizes: ParallelSizes,
    num_microbatches: int,
    encoder_work_s: float,
    *,
    num_gpus: int,
) -> float:
    alone_s = pipeline_bound_s(
        total_s=times.total_s,
        slowest_s=max(times.total_s / sizes.pp, times.longest_s),
        forward_share=times.forward_share,
        num_stages=sizes.pp,
        num_microbatches=num_microbatches,
    )
    work_s = times.total_s * num_microbatches * sizes.num_ranks / sizes.pp + encoder_work_s
    return max(alone_s, work_s / num_gpus)


def _average_bytes(estimator: Estimator, costs: ModuleCosts) -> float:
    """Memory of a stage on average, with one task between its passes."""
    runs = [PartRun(1, costs.input), *costs.layers, PartRun(1, costs.output)]
    held = estimator.cost_model.held(costs, *runs)
    fixed = held.weights + held.gradients + held.optimizer
    return (fixed + held.activations_per_task) / costs.sizes.pp
