"""What a plan may say by design and this version cannot do yet.

Nothing is ignored in silence: each wish is refused by name. Work that adds a feature deletes
its lines here; no other file assumes these limits.
"""

from typing import TYPE_CHECKING

from megatron_mosaic.errors import PlanError
from megatron_mosaic.fields import show
from megatron_mosaic.layout.placement import LANGUAGE, ModulePlacement

if TYPE_CHECKING:
    from megatron_mosaic.layout.plan import Plan


def refuse_unsupported(plan: "Plan") -> None:
    """Refuses a consistent plan that this version cannot run.

    Raises:
        PlanError: It asks for a feature of a later version.
    """
    for placement in plan.modules.values():
        _refuse_sizes(placement)
    for edge in plan.edges:
        if LANGUAGE not in edge:
            raise PlanError(
                f"edges: edge={show(list(edge))} must begin or end at language: other edges are "
                f"not supported by this version; remove the edge"
            )
    if len(plan.outputs) > 1:
        raise PlanError(
            f"modules: outputs={show(list(plan.outputs))} must be one at most: several modules fed "
            f"by language are not supported by this version; keep one of them"
        )
    for name in plan.outputs:
        stages = plan.modules[name].num_stages
        if stages > 1:
            raise PlanError(
                f"modules.{name}: stages={stages} must be 1: a module fed by language with several "
                f"stages is not supported by this version; raise another size instead"
            )


def _refuse_sizes(placement: ModulePlacement) -> None:
    where = f"modules.{placement.name}"
    if placement.name != "language" and placement.sequence_parallel:
        raise PlanError(
            f"{where}: sequence_parallel=true must be false: an encoder with sequence parallelism "
            f"is not supported by this version; remove the key"
        )
