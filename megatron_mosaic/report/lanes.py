"""Lanes of a plan in words."""

from collections.abc import Mapping

from megatron_mosaic.layout.plan import Plan
from megatron_mosaic.layout.ranks import show_ranks
from megatron_mosaic.report.units import ranks_text
from megatron_mosaic.schedule.graph import rank_kinds
from megatron_mosaic.schedule.lanes import has_lanes, lanes_of


def quotas(plan: Plan) -> Mapping[str, str]:
    """What modules have of each of their GPUs while others run there; nothing for the others."""
    return {
        name: f"{placement.share.sms} SMs"
        for name, placement in plan.modules.items()
        if placement.share is not None
    }


def describe_lanes(plan: Plan) -> str:
    """Says which modules run at the same time, and with what; empty where they take turns.

    Returns:
        A line for each list of modules that share ranks, without a final newline.
    """
    if not has_lanes(plan):
        return ""
    ranks_of: dict[tuple[str, ...], list[int]] = {}
    for kind in rank_kinds(plan):
        lanes = lanes_of(plan, kind.ranks[0])
        if len(lanes) > 1:
            ranks_of.setdefault(lanes, []).extend(kind.ranks)
    own = quotas(plan)
    return "\n".join(
        f"{ranks_text(show_ranks(sorted(ranks)).strip('[]'))}: at the same time "
        + ", ".join(f"{name} ({own.get(name, 'all SMs')})" for name in lanes)
        for lanes, ranks in ranks_of.items()
    )
