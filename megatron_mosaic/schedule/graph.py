"""The module graph as a schedule sees it: order, distances, and who needs a backward pass."""

from collections.abc import Iterable
from graphlib import TopologicalSorter
from typing import NamedTuple

from megatron_mosaic.layout.placement import LANGUAGE
from megatron_mosaic.layout.plan import Plan


class Stage(NamedTuple):
    """One pipeline stage of a module: a node of the joint pipeline."""

    module: str
    stage: int


class RankKind(NamedTuple):
    """Ranks that host the same stages.

    Args:
        stages: The stages, in plan order.
        ranks: The ranks, ascending.
    """

    stages: tuple[Stage, ...]
    ranks: tuple[int, ...]


def show_stages(stages: Iterable[tuple[str, int]]) -> list[str]:
    """Shortest text of the stages of each module: ``vision.0``, ``language.0,4,...,20``."""
    of_module: dict[str, list[int]] = {}
    for module, stage in stages:
        of_module.setdefault(module, []).append(stage)
    return [f"{module}.{_show_numbers(numbers)}" for module, numbers in of_module.items()]


def _show_numbers(numbers: list[int]) -> str:
    first, second, last = numbers[0], numbers[min(1, len(numbers) - 1)], numbers[-1]
    if len(numbers) > 3 and numbers == [*range(first, last + 1, max(second - first, 1))]:
        return f"{first},{second},...,{last}"
    return ",".join(map(str, numbers))


def module_order(plan: Plan) -> tuple[str, ...]:
    """Modules in an order in which every module comes after those that feed it."""
    feeders: dict[str, list[str]] = {name: [] for name in plan.modules}
    for source, destination in sorted(plan.edges):
        feeders[destination].append(source)
    return tuple(TopologicalSorter(feeders).static_order())


def stage_order(plan: Plan) -> tuple[Stage, ...]:
    """All stages of all modules, every stage after those that feed it."""
    return tuple(
        Stage(name, stage)
        for name in module_order(plan)
        for stage in range(plan.modules[name].num_stages)
    )


def stage_distances(plan: Plan) -> dict[Stage, int]:
    """Longest path, in stages, from every stage to the end of the module graph.

    The last stage of the language model has distance 0, the encoders that feed a language
    model of ``P`` stages have at least ``P``.
    """
    distances: dict[Stage, int] = {}
    for name in reversed(module_order(plan)):
        successors = [destination for source, destination in plan.edges if source == name]
        behind = max((distances[Stage(after, 0)] + 1 for after in successors), default=0)
        num_stages = plan.modules[name].num_stages
        for stage in range(num_stages):
            distances[Stage(name, stage)] = behind + num_stages - 1 - stage
    return distances


def upstream(plan: Plan, module: str) -> frozenset[str]:
    """Modules that feed ``module``, directly or through others."""
    found: set[str] = set()
    open_ends = [module]
    while open_ends:
        current = open_ends.pop()
        feeders = {source for source, destination in plan.edges if destination == current}
        open_ends += sorted(feeders - found)
        found |= feeders
    return frozenset(found)


def needs_backward(plan: Plan, module: str) -> bool:
    """Whether a module has something trainable in itself or upstream.

    A frozen module that is fed by a trainable one still passes the gradient on, so it needs a
    backward pass; one with nothing trainable behind it does not.
    """
    behind = upstream(plan, module) | {module}
    return any(plan.modules[name].trainable != () for name in behind)


def ahead_modules(plan: Plan) -> frozenset[str]:
    """Modules that run a step ahead: all that can, if the plan wants it.

    Those are the modules before the language model without a backward pass: nothing that a step
    trains changes what they make of the next one.
    """
    if not plan.schedule.ahead:
        return frozenset()
    before = [name for name in plan.modules if LANGUAGE not in upstream(plan, name) | {name}]
    return frozenset(name for name in before if not needs_backward(plan, name))


def hosted_stages(plan: Plan, rank: int) -> tuple[Stage, ...]:
    """Stages that run on a rank, in plan order; of every module its virtual stages."""
    return tuple(
        Stage(name, stage)
        for name, placement in plan.modules.items()
        if rank in placement.ranks
        for stage in placement.stages_of(rank)
    )


def rank_kinds(plan: Plan) -> tuple[RankKind, ...]:
    """Ranks that are not idle, by the stages that they host; in the order of their first ranks."""
    hosted: dict[int, list[Stage]] = {}
    for name, placement in plan.modules.items():
        for stage in range(placement.num_stages):
            for rank in placement.stage_ranks(stage):
                hosted.setdefault(rank, []).append(Stage(name, stage))
    kinds: dict[tuple[Stage, ...], list[int]] = {}
    for rank in sorted(hosted):
        kinds.setdefault(tuple(hosted[rank]), []).append(rank)
    return tuple(RankKind(stages, tuple(ranks)) for stages, ranks in kinds.items())
