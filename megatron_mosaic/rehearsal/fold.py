"""Makes a plan smaller where its ranks and its microbatches are alike.

A plan for thousands of ranks has many data-parallel replicas, which do the same with other samples:

    language, dp 4     0 1   2 3   4 5   6 7         0 1   2 3
    vision, dp 4       0 1   2 3   4 5   6 7   ->    0 1   2 3      a half, on the same ranks

What remains has the same tensor-, context- and pipeline-parallel sizes, the same routes between
replicas, and at least two replicas of what had several.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from megatron_mosaic.errors import LayoutError, PlanError
from megatron_mosaic.layout.placement import LANGUAGE, ModulePlacement
from megatron_mosaic.layout.plan import Plan
from megatron_mosaic.layout.ranks import show_ranks
from megatron_mosaic.rehearsal.tiny import MOST_LAYERS
from megatron_mosaic.schedule.graph import rank_kinds

LEAST_REPLICAS = 2
LEAST_ROUNDS = 2  # of microbatches through the language model's pipeline: filling, and full


@dataclass(frozen=True, kw_only=True)
class Folded:
    """A plan to rehearse, and what it leaves out of the one that was asked for.

    Args:
        plan: The smaller plan, or the plan itself.
        notes: What was left out, one line each.
    """

    plan: Plan
    notes: tuple[str, ...] = ()


def fold(plan: Plan, *, max_ranks: int, where: str) -> Folded:
    """Leaves out replicas, microbatches and layers that would only repeat others.

    Args:
        plan: The plan.
        max_ranks: Most ranks.
        where: Name of the plan in messages.

    Raises:
        PlanError: The plan is larger, and no part of it has its replicas in equal proportions.
    """
    smaller, notes = _with_fewer_replicas(plan, max_ranks=max_ranks, where=where)
    for shorten in (_with_fewer_microbatches, _with_fewer_layers, _without_adapters):
        smaller, more = shorten(smaller)
        notes += more
    return Folded(plan=smaller, notes=notes)


def _with_fewer_replicas(plan: Plan, *, max_ranks: int, where: str) -> tuple[Plan, tuple[str, ...]]:
    if plan.world_size <= max_ranks:
        return plan, ()
    for factor in _factors(plan):
        part = part_of(plan, factor)
        if part is not None and part.world_size <= max_ranks:
            return part, (
                f"one of {factor} equal parts of the data-parallel replicas: "
                f"{part.world_size} of {plan.world_size} ranks",
            )
    smallest = min(
        (part.world_size for f in _factors(plan) if (part := part_of(plan, f)) is not None),
        default=plan.world_size,
    )
    raise PlanError(
        f"{where}: world_size={plan.world_size} must fold to <= {max_ranks} ranks, and leaving out "
        f"equal replicas gives {smallest} at the least; give --ranks {smallest}"
    )


def _factors(plan: Plan) -> Iterator[int]:
    """Numbers of equal parts into which the replicas of every module can be cut."""
    replicas = [each.data_parallel_size for each in plan.modules.values()]
    for factor in range(2, max(replicas) + 1):
        if all(n % factor == 0 and n // factor >= min(n, LEAST_REPLICAS) for n in replicas):
            yield factor


def part_of(plan: Plan, factor: int) -> Plan | None:
    """The first of ``factor`` equal parts of a plan's replicas, on ranks counted from 0.

    Returns:
        None if modules share ranks in such a way that no part of them is by itself.
    """
    kept = _kept_replicas(plan, factor)
    if kept is None:
        return None
    ranks = sorted({rank for each in kept.values() for rank in each})
    number = {rank: index for index, rank in enumerate(ranks)}
    try:
        return replace(
            plan,
            world_size=len(ranks),
            global_batch_size=plan.global_batch_size // factor,
            modules={
                name: replace(
                    placement,
                    ranks=tuple(number[rank] for rank in kept[name]),
                    data_parallel_size=placement.data_parallel_size // factor,
                )
                for name, placement in plan.modules.items()
            },
            schedule=replace(plan.schedule, order=_order_of(plan, number)),
        )
    except (LayoutError, PlanError):
        return None  # such as experts that need more ranks than are left


def _kept_replicas(plan: Plan, factor: int) -> dict[str, tuple[int, ...]] | None:
    """Ranks of the replicas that are kept, by module, in the order of its list."""
    kept = {LANGUAGE: _ranks_of(plan.language, range(plan.language.data_parallel_size // factor))}
    inside = set(kept[LANGUAGE])
    outside = set(plan.language.ranks) - inside
    for name in plan.encoders:
        placement = plan.modules[name]
        count = placement.data_parallel_size // factor
        replicas = {dp: set(_ranks_of(placement, [dp])) for dp in range(count * factor)}
        # A replica with a rank that is left out is left out; those that share ranks come first.
        whole = [dp for dp, ranks in replicas.items() if not ranks & outside]
        chosen = sorted(sorted(whole, key=lambda dp: not replicas[dp] & inside)[:count])
        shared = {rank for dp in chosen for rank in replicas[dp]}
        if len(chosen) < count or (set(placement.ranks) & inside) - shared:
            return None
        kept[name] = _ranks_of(placement, chosen)
    return kept


def _ranks_of(placement: ModulePlacement, replicas: Sequence[int]) -> tuple[int, ...]:
    return tuple(rank for rank in placement.ranks if placement.coordinates(rank).dp in replicas)


def _order_of(plan: Plan, number: dict[int, int]) -> tuple[tuple[str, str], ...] | None:
    """The plan's own order of tasks, of the kinds of ranks that are left."""
    if plan.schedule.order is None:
        return None
    text_of = dict(plan.schedule.order)
    left = [
        (kind.ranks, [number[r] for r in kind.ranks if r in number]) for kind in rank_kinds(plan)
    ]
    return tuple((show_ranks(own), text_of[show_ranks(ranks)]) for ranks, own in left if own)


def _with_fewer_microbatches(plan: Plan) -> tuple[Plan, tuple[str, ...]]:
    """Shortens the steady part of a step, where its order does not stand in the plan."""
    total, group = plan.num_microbatches, plan.schedule.group_size(plan.num_microbatches)
    if plan.schedule.order is not None or (
        plan.schedule.kind == "colocated" and plan.schedule.encoder_group is None
    ):
        return plan, ()
    stages = plan.language.num_stages
    enough = max(LEAST_ROUNDS * max(stages, *_depths(plan)), LEAST_ROUNDS * group)
    samples = plan.global_batch_size // total
    for number in range(enough, total):
        if number % group == 0 and number % plan.language.pipeline_model_parallel_size == 0:
            shorter = replace(plan, global_batch_size=number * samples)
            return shorter, (f"{number} of {total} microbatches of a step",)
    return plan, ()


def _depths(plan: Plan) -> list[int]:
    return [placement.num_stages for placement in plan.modules.values()]


def _with_fewer_layers(plan: Plan) -> tuple[Plan, tuple[str, ...]]:
    modules, notes = {}, []
    for name, placement in plan.modules.items():
        modules[name], split = placement, placement.layers_per_stage
        if split is not None and sum(split) > max(MOST_LAYERS, placement.num_stages):
            scale = sum(split) / MOST_LAYERS
            thin = tuple(max(1, round(layers / scale)) for layers in split)
            modules[name] = replace(placement, layers_per_stage=thin)
            notes.append(
                f"{sum(thin)} of {sum(split)} layers of {name}, {list(thin)} in its stages"
            )
    return replace(plan, modules=modules), tuple(notes)


def _without_adapters(plan: Plan) -> tuple[Plan, tuple[str, ...]]:
    """Trains modules whole whose adapters only the user's script knows."""
    modules, notes = {}, []
    for name, placement in plan.modules.items():
        modules[name] = placement
        if any("lora" in entry or "adapter" in entry for entry in placement.trainable or ()):
            modules[name] = replace(placement, trainable=None)
            notes.append(f"{name} as if all of it trained, not {list(placement.trainable or ())}")
    return replace(plan, modules=modules), tuple(notes)
