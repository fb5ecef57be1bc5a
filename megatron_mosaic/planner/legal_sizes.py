"""Sizes of modules that Megatron and this runtime allow, by construction."""

from collections.abc import Iterator
from math import gcd

from megatron_mosaic.cost.sizes import ParallelSizes
from megatron_mosaic.layout.placement import LANGUAGE
from megatron_mosaic.model.layers import (
    Experts,
    LatentAttention,
    LinearAttention,
    Mixer,
    Mlp,
    SelfAttention,
    StateSpace,
)
from megatron_mosaic.model.spec import ModuleSpec, Projector
from megatron_mosaic.planner.problem import Problem, has_experts


def divisors(number: int) -> tuple[int, ...]:
    """Divisors, ascending."""
    low = [n for n in range(1, int(number**0.5) + 1) if number % n == 0]
    return tuple(low + [number // n for n in reversed(low) if n * n != number])


def tensor_sizes(module: ModuleSpec, problem: Problem) -> tuple[int, ...]:
    """Tensor-parallel sizes: inside a node, and divisors of what is split."""
    per_node = min(problem.cluster.gpus_per_node, problem.num_gpus)
    return tuple(
        tp
        for tp in divisors(problem.cluster.gpus_per_node)
        if tp <= per_node and _splits(module, tp) and problem.pins.allows(module.name, "tp", tp)
    )


def _splits(module: ModuleSpec, tp: int) -> bool:
    """Whether ``tp`` divides heads, groups and sizes of all layers, as Megatron asks."""
    return all(
        _splits_mixer(run.layer.mixer, tp) and _splits_mlp(run.layer.mlp, tp)
        for run in module.layers
    )


def _splits_mixer(mixer: Mixer | None, tp: int) -> bool:
    match mixer:
        case SelfAttention(num_heads=heads, num_query_groups=groups):
            return heads % tp == 0 and (groups % tp == 0 or tp % groups == 0)
        case LatentAttention(num_heads=heads) | StateSpace(num_heads=heads):
            return heads % tp == 0
        case LinearAttention(num_key_heads=keys, num_value_heads=values):
            return gcd(keys, values) % tp == 0
    return True


def _splits_mlp(mlp: Mlp | Experts | None, tp: int) -> bool:
    match mlp:
        case Mlp(ffn_hidden_size=size) | Experts(shared_ffn_hidden_size=size):
            return size % tp == 0
    return True


def context_sizes(module: ModuleSpec, problem: Problem, *, tp: int) -> tuple[int, ...]:
    """Context-parallel sizes: powers of two that leave every rank enough tokens.

    An encoder gathers keys and values, so any length can be split; one whose projector joins
    tokens of an image has none (docs/limits.md).
    """
    length = module.tokens_per_item.largest
    joins = isinstance(module.output, Projector) and module.output.merged_tokens > 1
    sizes, cp = [1], 2
    while not joins and cp * tp <= problem.num_gpus:
        if length / cp < problem.space.min_tokens_per_rank:
            break
        if module.name != LANGUAGE or _cuts(problem, 2 * cp * tp):
            sizes.append(cp)
        cp *= 2
    return tuple(cp for cp in sizes if problem.pins.allows(module.name, "cp", cp))


def _cuts(problem: Problem, parts: int) -> bool:
    """Whether sequences can be cut: any can under a multimodal mask, in unlike parts."""
    return problem.workload is not None or problem.model.sequence_length % parts == 0


def pipeline_sizes(module: ModuleSpec, problem: Problem, *, most: int) -> tuple[int, ...]:
    """Pipeline sizes: all small ones, then coarser steps, and divisors of the layers."""
    most = min(most, module.num_layers)
    pinned = problem.pins.modules.get(module.name, {})
    if "layers_per_stage" in pinned:
        stages = len(pinned["layers_per_stage"])
        return (
            (stages,)
            if stages <= most
            and sum(pinned["layers_per_stage"]) == (module.num_layers)
            and problem.pins.allows(module.name, "pp", stages)
            else ()
        )
    steps = {*range(1, 9), *range(10, 17, 2), *range(20, 33, 4), *range(40, 65, 8)}
    steps |= {*range(80, 129, 16), *divisors(module.num_layers)}
    steps |= {pinned["pp"]} if "pp" in pinned else set()
    return tuple(
        pp for pp in sorted(steps) if pp <= most and problem.pins.allows(module.name, "pp", pp)
    )


def language_sizes(problem: Problem, *, micro_batch_size: int) -> Iterator[ParallelSizes]:
    """Yields all sizes of the language model on at most all GPUs."""
    module, pins, num_gpus = problem.model.language, problem.pins, problem.num_gpus
    if problem.global_batch_size % micro_batch_size:
        return
    replicas = [
        dp
        for dp in divisors(problem.global_batch_size // micro_batch_size)
        if pins.allows(LANGUAGE, "dp", dp)
    ]
    for tp in tensor_sizes(module, problem):
        for cp in context_sizes(module, problem, tp=tp):
            for pp in pipeline_sizes(module, problem, most=num_gpus // (tp * cp)):
                for dp in replicas:
                    if tp * cp * pp * dp > num_gpus:
                        break
                    yield from _with_options(module, problem, tp=tp, cp=cp, pp=pp, dp=dp)


def _with_options(
    module: ModuleSpec, problem: Problem, *, tp: int, cp: int, pp: int, dp: int
) -> Iterator[ParallelSizes]:
    pins = problem.pins
    for sequence_parallel in _sequence_parallel(problem, tp=tp, cp=cp):
        for ep, etp in _expert_sizes(module, problem, tp=tp, stage=tp * cp * dp):
            for recompute in problem.space.recompute:
                if pins.allows(LANGUAGE, "recompute", recompute):
                    yield ParallelSizes(
                        tp=tp,
                        cp=cp,
                        dp=dp,
                        pp=pp,
                        ep=ep,
                        etp=etp,
                        sequence_parallel=sequence_parallel,
                        recompute=recompute,
                    )


def _sequence_parallel(problem: Problem, *, tp: int, cp: int) -> tuple[bool, ...]:
    """Sequence parallelism wherever it can be: it saves memory at no cost in bytes sent."""
    cut = tp * (2 * cp if cp > 1 else 1)
    possible = tp > 1 and _cuts(problem, cut)
    pinned = problem.pins.modules.get(LANGUAGE, {}).get("sequence_parallel", possible)
    if pinned and not possible:
        return ()
    if not pinned and tp > 1 and has_experts(problem.model.language):
        return ()  # Megatron refuses experts with tensor parallelism alone
    return (pinned,)


def _expert_sizes(
    module: ModuleSpec, problem: Problem, *, tp: int, stage: int
) -> tuple[tuple[int, int], ...]:
    """Pairs of expert-parallel and expert-tensor-parallel size on the ranks of a stage."""
    experts = [run.layer.mlp for run in module.layers if isinstance(run.layer.mlp, Experts)]
    pins = problem.pins
    if not experts:
        allowed = pins.allows(module.name, "ep", 1) and pins.allows(module.name, "etp", tp)
        return ((1, tp),) if allowed else ()
    num_experts = gcd(*(part.num_experts for part in experts))
    hidden = gcd(*(part.ffn_hidden_size for part in experts))
    return tuple(
        (ep, etp)
        for etp in sorted({1, tp})
        for ep in divisors(num_experts)
        if hidden % etp == 0
        and stage % (ep * etp) == 0
        and pins.allows(module.name, "ep", ep)
        and pins.allows(module.name, "etp", etp)
    )


def encoder_sizes(
    name: str,
    problem: Problem,
    *,
    num_ranks: int,
    all_of_them: bool,
    num_samples: int,
) -> Iterator[ParallelSizes]:
    """Yields all sizes of an encoder on some ranks.

    Args:
        name: The encoder.
        problem: What is asked.
        num_ranks: Ranks that it may use.
        all_of_them: Whether it uses every one, in one pipeline stage, or any number of them.
        num_samples: Samples of one task of all replicas; more replicas than samples would wait.
    """
    module, pins = problem.model.modules[name], problem.pins
    for tp in tensor_sizes(module, problem):
        for cp in context_sizes(module, problem, tp=tp):
            if all_of_them:
                stages = (1,) if pins.allows(name, "pp", 1) else ()
            else:
                most = min(num_ranks // (tp * cp), problem.space.max_encoder_stages)
                stages = pipeline_sizes(module, problem, most=most)
                if "pp" not in pins.modules.get(name, {}):
                    stages = tuple(pp for pp in stages if pp & (pp - 1) == 0)
            for pp in stages:
                for dp in _replicas(num_ranks, tp * cp * pp, num_samples, all_of_them):
                    if not pins.allows(name, "dp", dp):
                        continue
                    for recompute in problem.space.recompute:
                        if pins.allows(name, "recompute", recompute):
                            yield ParallelSizes(
                                tp=tp, cp=cp, dp=dp, pp=pp, etp=tp, recompute=recompute
                            )


def _replicas(
    num_ranks: int, per_replica: int, num_samples: int, all_of_them: bool
) -> tuple[int, ...]:
    most = num_ranks // per_replica
    if all_of_them:
        return (most,) if most and num_ranks % per_replica == 0 else ()
    return tuple(dp for dp in divisors(num_samples) if dp <= most)
