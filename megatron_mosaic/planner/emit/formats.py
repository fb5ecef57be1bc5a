"""The table of formats that a plan can be written in."""

from collections.abc import Callable, Mapping

from megatron_mosaic.errors import PlanError
from megatron_mosaic.layout.plan import Plan
from megatron_mosaic.planner.emit.bridge import emit_bridge
from megatron_mosaic.planner.emit.emission import Emission, InexpressibleError, Launch
from megatron_mosaic.planner.emit.megatron import emit_megatron
from megatron_mosaic.planner.emit.mimo import emit_mimo
from megatron_mosaic.planner.emit.slurm import emit_slurm
from megatron_mosaic.planner.emit.torchrun import emit_torchrun

FORMATS: Mapping[str, Callable[[Plan, Launch], Emission]] = {
    "megatron": emit_megatron,
    "mimo": emit_mimo,
    "bridge": emit_bridge,
    "torchrun": emit_torchrun,
    "slurm": emit_slurm,
}


def emit(plan: Plan, *, form: str, launch: Launch) -> Emission:
    """Writes a plan in one of the formats.

    Raises:
        PlanError: The format cannot express the plan; the message says why, and which can.
    """
    try:
        return FORMATS[form](plan, launch)
    except InexpressibleError as error:
        others = [name for name in FORMATS if name != form and _expresses(name, plan, launch)]
        if others:
            advice = f"use --format {' or '.join(others)}"
        else:
            advice = f"give --gpus-per-node a divisor of {plan.world_size} for torchrun and slurm"
        raise PlanError(f"{launch.plan_path}: {error} for --format {form}; {advice}") from None


def _expresses(form: str, plan: Plan, launch: Launch) -> bool:
    try:
        FORMATS[form](plan, launch)
    except InexpressibleError:
        return False
    return True
