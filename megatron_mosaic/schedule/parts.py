"""Stages divided into ranks that run their tasks at one time."""

from collections.abc import Collection
from typing import NamedTuple

from megatron_mosaic.layout.plan import Plan
from megatron_mosaic.schedule.graph import RankKind, Stage, stage_order
from megatron_mosaic.schedule.lanes import lane_of
from megatron_mosaic.schedule.steps import Edge, communicators, edges_of


class Part(NamedTuple):
    """Ranks that run the tasks of a stage at one time.

    Args:
        stage: The stage.
        kinds: Positions of their kinds in the plan's ``rank_kinds``.
    """

    stage: Stage
    kinds: tuple[int, ...]


class Link(NamedTuple):
    """What joins parts of two stages.

    Args:
        edge: Position of the edge in the plan's ``edges_of``.
        source: Position of the part that activations come from.
        destination: Position of the part that they go to.
    """

    edge: int
    source: int
    destination: int


def parts_of(
    plan: Plan,
    kinds: tuple[RankKind, ...],
    *,
    apart: bool,
    together: Collection[Stage] = (),
) -> tuple[Part, ...]:
    """Parts of all stages, in the order of the stages.

    Args:
        plan: The plan.
        kinds: Its kinds of ranks.
        apart: Replicas on ranks that host different stages beside run their tasks each at its
            own time. Otherwise all ranks of a stage run together.
        together: Stages of which they do in any case.
    """
    parts = []
    for stage in stage_order(plan):
        hosts = [k for k, kind in enumerate(kinds) if stage in kind.stages]
        joined = (
            _joined_kinds(plan, kinds, stage, hosts) if apart and stage not in together else [hosts]
        )
        parts += [Part(stage, tuple(members)) for members in joined]
    return tuple(parts)


def lanes_of_parts(plan: Plan, parts: tuple[Part, ...]) -> tuple[tuple[int, ...], ...]:
    """Numbers of the lanes in which each part runs its tasks: one on every kind of its ranks.

    Ranks that run one module at a time have one lane each.
    """
    lanes = list(dict.fromkeys(lane_of(plan, part.stage.module) for part in parts))
    return tuple(
        tuple(len(lanes) * k + lanes.index(lane_of(plan, part.stage.module)) for k in part.kinds)
        for part in parts
    )


def links_of(plan: Plan, kinds: tuple[RankKind, ...], parts: tuple[Part, ...]) -> tuple[Link, ...]:
    """Pairs of parts that an edge joins: all of two modules, those of one pipeline of a module."""
    places: dict[Stage, list[int]] = {}
    for position, part in enumerate(parts):
        places.setdefault(part.stage, []).append(position)
    links = []
    for number, edge in enumerate(edges_of(plan)):
        sources, destinations = (places[end] for end in edge.ends)
        whole = edge.source != edge.destination or len(sources) == len(destinations) == 1
        meet = None if whole else _meeting_kinds(plan, edge, kinds)
        links += [
            Link(number, source, destination)
            for source in sources
            for destination in destinations
            if meet is None
            or any(
                (k, other) in meet
                for k in parts[source].kinds
                for other in parts[destination].kinds
            )
        ]
    return tuple(links)


def _joined_kinds(
    plan: Plan, kinds: tuple[RankKind, ...], stage: Stage, hosts: list[int]
) -> list[list[int]]:
    """Kinds of ranks, joined where ranks of both run a task together."""
    kind_of = {rank: k for k in hosts for rank in kinds[k].ranks}
    label = {k: k for k in hosts}
    for members in plan.modules[stage.module].task_groups():
        met = {label[kind_of[rank]] for rank in members if rank in kind_of}
        if len(met) > 1:
            label = {k: min(met) if own in met else own for k, own in label.items()}
    return [[k for k in hosts if label[k] == first] for first in sorted(set(label.values()))]


def _meeting_kinds(plan: Plan, edge: Edge, kinds: tuple[RankKind, ...]) -> set[tuple[int, int]]:
    kind_of = {rank: k for k, kind in enumerate(kinds) for rank in kind.ranks}
    source = set(plan.modules[edge.source].stage_ranks(edge.source_stage))
    return {
        (kind_of[one], kind_of[other])
        for members in communicators(plan, edge)
        for one in members
        if one in source
        for other in members
        if other != one or len(members) == 1
    }
