"""Time of 1F1B over the stages of all modules, from the longest ways through it."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Hop(NamedTuple):
    """Way of a microbatch to a stage behind, and of its gradient back."""

    stage: int
    hop_s: float


class PipelineStage(NamedTuple):
    """A stage of the joint pipeline.

    Args:
        forward_s: Forward pass of a microbatch.
        backward_s: Backward pass; None where there is none.
        after: Stages that it feeds, all of them further on in the list of stages.
    """

    forward_s: float
    backward_s: float | None
    after: tuple[Hop, ...] = ()


class Ways(NamedTuple):
    """Longest ways between a stage's first and last tasks and both ends of the step.

    Args:
        distance: Stages behind it on the longest path: tasks of its warm-up.
        to_forward_s: From the beginning to its first forward pass.
        to_backward_s: From the beginning to the end of its first backward pass.
        from_forward_s: From its last forward pass to the end.
        from_backward_s: From its last backward pass to the end.
    """

    distance: int
    to_forward_s: float
    to_backward_s: float
    from_forward_s: float
    from_backward_s: float


def interleaved_s(stages: Sequence[PipelineStage], *, chunks: int, num_microbatches: int) -> float:
    """Estimates interleaved 1F1B: the bubble shrinks with the number of chunks of each rank.

    Messages go while a rank computes, so hops only delay the beginning and the end.

    Args:
        stages: All stages, one after the other, with the time of all their chunks.
        chunks: Chunks of each of them.
        num_microbatches: Microbatches of the step.

    Source:
        Narayanan et al., 2021, arXiv:2104.04473, section 2.2.2: bubble (p - 1)(t_f + t_b) / v.
    """
    busy_s = [stage.forward_s + (stage.backward_s or 0.0) for stage in stages]
    hops_s = sum(2 * hop_s for stage in stages for _, hop_s in stage.after)
    return (num_microbatches - 1 / chunks) * max(busy_s) + sum(busy_s) / chunks + hops_s


def pipeline_s(stages: Sequence[PipelineStage], *, num_microbatches: int) -> float:
    """Estimates the time of 1F1B; never more than a simulation finds.

    A step ends when the longest chain of tasks does, each of which waits for the one before. The
    chains weighed here reach one stage by the longest way, stay with its tasks, or go round
    between it and another one, and leave by the longest way. With equal stages and no hops this
    is ``(M + P - 1) * (F + B)``.

    Args:
        stages: All stages, each after those that feed it.
        num_microbatches: Microbatches of the step.
    """
    # Stage 1 of three, four microbatches: by the way down to its first backward pass, on until
    # its last forward pass, and down and up again. Tasks of the chain in capitals.
    #
    # stage 0  F0 f1 f2 .  .  .  .  b0 f3 b1 .  b2 .  B3
    # stage 1  .  F0 f1 .  .  B0 F2 B1 F3 b2 .  .  B3 .
    # stage 2  .  .  F0 B0 f1 b1 .  f2 b2 .  F3 B3 .  .
    ways = ways_through(stages, num_microbatches=num_microbatches)
    stays_s = [
        longest_stay_s(stage, way, num_tasks=num_microbatches)
        for stage, way in zip(stages, ways, strict=True)
    ]
    return max(*stays_s, _longest_round_s(stages, ways, num_microbatches))


def longest_stay_s(stage: PipelineStage, ways: Ways, *, num_tasks: int) -> float:
    """Longest chain that comes to a stage, stays with its tasks, and leaves it.

    It comes to the first forward or to the first backward pass, and leaves after the last one of
    either.

    Args:
        stage: The stage.
        ways: Ways to it and from it.
        num_tasks: Its forward passes.
    """
    forward_s, backward_s = stage.forward_s, stage.backward_s or 0.0
    # Forward passes after the first backward pass, which are backward ones before the last
    # forward pass.
    steady = max(num_tasks - 1 - ways.distance, 0)
    all_forward_s, all_backward_s = num_tasks * forward_s, num_tasks * backward_s
    chain_s = (
        ways.to_forward_s
        + all_forward_s
        + max(all_backward_s + ways.from_backward_s, steady * backward_s + ways.from_forward_s)
    )
    if stage.backward_s is None:
        return chain_s
    until_s = ways.to_backward_s + steady * forward_s
    chain_s = max(chain_s, until_s + all_backward_s - backward_s + ways.from_backward_s)
    if steady:
        chain_s = max(chain_s, until_s + (steady - 1) * backward_s + ways.from_forward_s)
    return chain_s


def distances(stages: Sequence[PipelineStage]) -> list[int]:
    """Stages behind each stage on the longest path."""
    found = [0] * len(stages)
    for s in reversed(range(len(stages))):
        found[s] = max((found[hop.stage] + 1 for hop in stages[s].after), default=0)
    return found


def ways_through(stages: Sequence[PipelineStage], *, num_microbatches: int) -> list[Ways]:
    """Ways to and from every stage."""
    behind = distances(stages)
    warm_up = [min(distance + 1, num_microbatches) for distance in behind]
    to_forward_s, from_backward_s = [0.0] * len(stages), [0.0] * len(stages)
    for s, (forward_s, backward_s, after) in enumerate(stages):
        for stage, hop_s in after:
            arrival_s = to_forward_s[s] + forward_s + hop_s
            to_forward_s[stage] = max(to_forward_s[stage], arrival_s)
            if backward_s is not None:
                rest_s = hop_s + backward_s + from_backward_s[s]
                from_backward_s[stage] = max(from_backward_s[stage], rest_s)
    to_backward_s, from_forward_s = [0.0] * len(stages), [0.0] * len(stages)
    for s in reversed(range(len(stages))):
        forward_s, backward_s, after = stages[s]
        pass_s = backward_s or 0.0
        to_backward_s[s] = to_forward_s[s] + warm_up[s] * forward_s + pass_s
        from_forward_s[s] = warm_up[s] * pass_s + from_backward_s[s]
        for stage, hop_s in after:
            to_backward_s[s] = max(to_backward_s[s], to_backward_s[stage] + hop_s + pass_s)
            rest_s = hop_s + stages[stage].forward_s + from_forward_s[stage]
            from_forward_s[s] = max(from_forward_s[s], rest_s)
    columns = behind, to_forward_s, to_backward_s, from_forward_s, from_backward_s
    return [Ways(*row) for row in zip(*columns, strict=True)]


def _longest_round_s(
    stages: Sequence[PipelineStage], ways: Sequence[Ways], num_microbatches: int
) -> float:
    """Longest chain that goes round between two stages: hops slow a pipeline only so."""
    chain = _slowest_chain(stages)
    hops_s = [hop_s for _, hop_s in chain]
    if len(chain) < 2 or not any(hops_s):
        return 0.0
    own = [stages[s] for s, _ in chain]
    forward_s = np.array([stage.forward_s for stage in own])
    backward_s = np.array([stage.backward_s or 0.0 for stage in own])
    on_chain = [ways[s] for s, _ in chain]
    distance = np.array([way.distance for way in on_chain])
    to_backward_s = np.array([way.to_backward_s for way in on_chain])
    from_forward_s = np.array([way.from_forward_s for way in on_chain])
    # Entry [s, t] goes down from s to t and up again; B of one microbatch frees s for the F
    # that is as many microbatches further on as there are stages between the two.
    end_s = np.cumsum(forward_s + backward_s) + 2 * np.cumsum([0.0, *hops_s[:-1]])
    round_s = end_s[None, :] - end_s[:, None] + (forward_s + backward_s)[:, None]
    per_round = distance[:, None] - distance[None, :] + 1
    steady = num_microbatches - 2 - distance[:, None]
    rounds = np.where(steady >= 0, steady // np.maximum(per_round, 1), 0)
    left = steady - rounds * per_round
    chain_s = to_backward_s[:, None] + rounds * round_s + from_forward_s[:, None]
    chain_s += (left + 1) * forward_s[:, None] + left * backward_s[:, None]
    return float(chain_s[(steady >= 0) & (per_round > 1)].max(initial=0.0))


def _slowest_chain(stages: Sequence[PipelineStage]) -> list[Hop]:
    """Stages with backward passes on the way that takes longest, each with its hop on."""
    rest_s, following = [0.0] * len(stages), list[Hop | None]([None] * len(stages))
    for s in reversed(range(len(stages))):
        forward_s, backward_s, after = stages[s]
        for hop in after:
            if rest_s[hop.stage] + 2 * hop.hop_s > rest_s[s]:
                rest_s[s], following[s] = rest_s[hop.stage] + 2 * hop.hop_s, hop
        if backward_s is not None:
            rest_s[s] += forward_s + backward_s
    passed_back = [s for s, stage in enumerate(stages) if stage.backward_s is not None]
    if not passed_back:
        return []
    s = max(passed_back, key=rest_s.__getitem__)
    chain = []
    while (hop := following[s]) is not None:
        chain.append(Hop(s, hop.hop_s))
        s = hop.stage
    return [*chain, Hop(s, 0.0)]
