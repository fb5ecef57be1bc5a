"""Parts of a GPU that modules may have of it while others run there: which ones to examine."""

from collections.abc import Iterator, Sequence
from itertools import chain, permutations

from megatron_mosaic.cluster.sm_partition import granularity, partitions, quotas, split_for
from megatron_mosaic.cluster.spec import Gpu
from megatron_mosaic.errors import LayoutError
from megatron_mosaic.layout.placement import LANGUAGE, ModulePlacement
from megatron_mosaic.layout.plan import Plan
from megatron_mosaic.planner.problem import Problem
from megatron_mosaic.planner.simulated import Simulated
from megatron_mosaic.schedule.graph import rank_kinds

Quotas = tuple[tuple[str, int], ...]
"""Multiprocessors of modules by name; one that is not there may use all of them."""

COLLECTIVE_SMS = 32
"""Fewest multiprocessors of a module whose tasks have collectives: they must run at once.

Source: NCCL user guide, ``ncclConfig_t``, ``maxCTAs``, unless it is set lower.
"""

_MOVED_GROUPS = (1, 4)
"""Smallest groups of multiprocessors that a step of the descent moves between two modules."""


def first_quotas(first: Simulated, problem: Problem) -> list[Quotas]:
    """Quotas under which schedules are compared: none, and those in proportion to the work.

    Of the latter there are two: with and without one for the language model, which else may use
    what the others leave.

    Args:
        first: A layout.
        problem: What is asked; quotas that it fixes are kept.
    """
    sharing = sharing_modules(first.plan)
    work_s = {name: _work_s(first, name) for name in sharing}
    dealt = _in_proportion(work_s, problem.cluster.gpu)
    capped = tuple((name, sms) for name, sms in dealt if name != LANGUAGE)
    found = (_with_pins(choice, problem) for choice in ((), dealt, capped))
    return [choice for choice in dict.fromkeys(found) if is_legal(choice, first.plan, problem)]


def more_quotas(entry: Simulated, problem: Problem) -> Iterator[Quotas]:
    """Yields quotas that may be better than an entry's: for two modules all that there are.

    For more modules it yields what a step of a descent leads to: a quota less, a quota more, or
    some multiprocessors of one module given to another.

    Args:
        entry: A layout with quotas.
        problem: What is asked; quotas that it fixes are kept.
    """
    sharing = sharing_modules(entry.plan)
    gpu = problem.cluster.gpu
    every = _of_two(sharing, gpu) if len(sharing) == 2 else _steps(entry, sharing, gpu)
    found = (_with_pins(choice, problem) for choice in every)
    for choice in dict.fromkeys(found):
        if is_legal(choice, entry.plan, problem):
            yield choice


def sharing_modules(plan: Plan) -> list[str]:
    """Modules that share ranks with others, in plan order."""
    shared = {name for names in _rank_modules(plan) for name in names}
    return [name for name in plan.modules if name in shared]


def _rank_modules(plan: Plan) -> list[list[str]]:
    """Modules of every kind of ranks that hosts several."""
    hosted = [list(dict.fromkeys(s.module for s in kind.stages)) for kind in rank_kinds(plan)]
    return [names for names in hosted if len(names) > 1]


def is_legal(choice: Quotas, plan: Plan, problem: Problem) -> bool:
    """Whether one split of every GPU can give its modules their quotas, and they can work so."""
    gpu, sms = problem.cluster.gpu, dict(choice)
    if any(sms < COLLECTIVE_SMS and _has_collectives(plan.modules[name]) for name, sms in choice):
        return False
    for names in _rank_modules(plan):
        try:
            split_for(
                [sms.get(name) for name in names],
                num_sms=gpu.num_sms,
                sizes=granularity(_capability(gpu)),
                where=gpu.name,
            )
        except LayoutError:
            return False
    return True


def _has_collectives(placement: ModulePlacement) -> bool:
    """Whether ranks of a module communicate inside a task."""
    shape = placement.shape
    return shape.tp * shape.cp * (placement.expert_model_parallel_size or 1) > 1


def _capability(gpu: Gpu) -> tuple[int, int]:
    assert gpu.compute_capability is not None, "only GPUs that can be shared have quotas"
    return gpu.compute_capability


def _with_pins(choice: Quotas, problem: Problem) -> Quotas:
    """Quotas with those that are fixed, in the order of the model's modules."""
    kept: dict[str, int | None] = {**dict(choice), **problem.pins.quotas}
    return tuple(
        (name, sms) for name in problem.model.modules if (sms := kept.get(name)) is not None
    )


def _work_s(first: Simulated, name: str) -> float:
    """Time of a module's tasks on one of its ranks, for one microbatch."""
    hosted = first.estimate.modules[name]
    return sum(stage.forward_s + stage.backward_s for stage in hosted.stages) / (
        hosted.group * len(hosted.stages)
    )


def _in_proportion(work_s: dict[str, float], gpu: Gpu) -> Quotas:
    """Deals all multiprocessors in proportion to work, in groups of the smallest size.

    What is left after whole groups goes to the last module, as the remainder of a split does.
    """
    least = granularity(_capability(gpu)).least
    num_groups, total_s = gpu.num_sms // least, sum(work_s.values())
    groups = dict.fromkeys(work_s, 1)
    for _ in range(num_groups - len(groups)):
        # Whoever has least for its work gets the next group.
        neediest = max(work_s, key=lambda name: work_s[name] / total_s / groups[name])
        groups[neediest] += 1
    last = max(groups, key=lambda name: groups[name])
    left = gpu.num_sms - num_groups * least
    return tuple(
        (name, count * least + (left if name == last else 0)) for name, count in groups.items()
    )


def _of_two(names: Sequence[str], gpu: Gpu) -> Iterator[Quotas]:
    """Yields all quotas of two modules: none, of one alone, and all ways to split the GPU."""
    yield ()
    legal = quotas(gpu.num_sms, compute_capability=_capability(gpu))
    for name in names:
        yield from (((name, sms),) for sms in legal)
    splits = partitions(gpu.num_sms, compute_capability=_capability(gpu), num_lanes=2)
    both = (((names[0], a), (names[1], b)) for a, b in splits)
    yield from chain.from_iterable((pair, _swapped(pair)) for pair in both)


def _swapped(pair: Quotas) -> Quotas:
    (first, a), (second, b) = pair
    return ((first, b), (second, a))


def _steps(entry: Simulated, names: Sequence[str], gpu: Gpu) -> Iterator[Quotas]:
    """Yields quotas one step away from an entry's."""
    sms, least = dict(entry.candidate.quotas), granularity(_capability(gpu)).least
    for name in names:
        others = tuple(item for item in sms.items() if item[0] != name)
        if name in sms:
            yield others
            continue
        room = gpu.num_sms - sum(sms.values())
        legal = quotas(gpu.num_sms, compute_capability=_capability(gpu))
        yield from ((*others, (name, quota)) for quota in legal if quota <= room)
    for giver, taker in permutations(sms, 2):
        for groups in _MOVED_GROUPS:
            moved = groups * least
            if sms[giver] > moved:
                yield tuple((sms | {giver: sms[giver] - moved, taker: sms[taker] + moved}).items())
