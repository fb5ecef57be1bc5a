"""What a plan file says of modules that run at the same time: their times beside each other."""

from collections.abc import Mapping
from typing import Any

from megatron_mosaic.layout.plan import Plan
from megatron_mosaic.schedule.graph import Stage
from megatron_mosaic.schedule.plan_program import program_of_plan
from megatron_mosaic.schedule.simulate import LaneTimes, Pass, PassTimes, simulate
from megatron_mosaic.schedule.steps import Edge

SEPARATOR = " | "
"""Stands between passes that meet."""


def lane_notes(
    plan: Plan,
    *,
    tasks_s: Mapping[Stage, PassTimes],
    transfers_s: Mapping[Edge, float],
    lanes: LaneTimes,
) -> dict[str, Any]:
    """Notes times of lanes, and how passes that meet in a step slow each other down.

    Args:
        plan: The plan, with its order.
        tasks_s: Of a stage's longest task on the whole GPU.
        transfers_s: Of one microbatch over an edge.
        lanes: What is noted.
    """
    met: dict[tuple[Pass, ...], tuple[float, ...]] = {}

    def slowdown(passes: tuple[Pass, ...]) -> tuple[float, ...]:
        met[passes] = lanes.slowdown(passes)
        return met[passes]

    recorded = lanes._replace(slowdown=slowdown)
    simulate(program_of_plan(plan), tasks_s=tasks_s, transfers_s=transfers_s, lanes=recorded)
    return {
        "shared_s": {
            f"{stage.module}.{stage.stage}": [_short(time_s) for time_s in times]
            for stage, times in lanes.shared_s.items()
        },
        "slowdown": {
            SEPARATOR.join(map(pass_text, passes)): [_short(factor) for factor in factors]
            for passes, factors in met.items()
            if len(passes) > 1
        },
    }


def pass_text(work: Pass) -> str:
    """A pass as notes name it, such as ``B vision.0``."""
    return f"{'B' if work.backward else 'F'} {work.stage.module}.{work.stage.stage}"


def _short(value: float) -> float:
    """Six digits, more than any prediction is good for."""
    return float(f"{value:.6g}")
