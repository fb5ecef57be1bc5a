"""What modules that run at the same time make of each other's times, as a plan file holds it."""

from collections.abc import Mapping
from typing import Any

from megatron_mosaic.schedule.graph import Stage
from megatron_mosaic.schedule.program import Program
from megatron_mosaic.schedule.simulate import LaneTimes, Pass, PassTimes, simulate
from megatron_mosaic.schedule.steps import Edge


def lane_notes(
    program: Program,
    *,
    tasks_s: Mapping[Stage, PassTimes],
    transfers_s: Mapping[Edge, float],
    lanes: LaneTimes,
) -> dict[str, Any]:
    """Notes with which a step can be simulated again.

    Returns:
        ``tasks_s``: forward and backward times with the quotas, by stage. ``slowdown``: for the
        passes that meet in a step of the program, how many times as long each takes.
    """
    met: dict[tuple[Pass, ...], tuple[float, ...]] = {}

    def slowdown(passes: tuple[Pass, ...]) -> tuple[float, ...]:
        met[passes] = lanes.slowdown(passes)
        return met[passes]

    noting = LaneTimes(lanes.shared_s, slowdown)
    simulate(program, tasks_s=tasks_s, transfers_s=transfers_s, lanes=noting)
    return {
        "tasks_s": {
            f"{stage.module}.{stage.stage}": list(map(_short, times))
            for stage, times in lanes.shared_s.items()
        },
        "slowdown": {
            " + ".join(map(pass_name, passes)): list(map(_short, factors))
            for passes, factors in met.items()
        },
    }


def pass_name(own: Pass) -> str:
    """Name of a pass of a stage: ``F vision.0``."""
    return f"{'B' if own.backward else 'F'} {own.stage.module}.{own.stage.stage}"


def noted_lanes(
    shared_s: Mapping[Stage, PassTimes], slowdown: Mapping[str, tuple[float, ...]]
) -> LaneTimes:
    """What notes say; passes that did not meet there are slowed as the worst that they met.

    Args:
        shared_s: Times with the quotas.
        slowdown: Factors by the names of the passes that meet, joined by `` + ``.
    """
    worst: dict[str, float] = {}
    for names, factors in slowdown.items():
        for name, factor in zip(names.split(" + "), factors, strict=True):
            worst[name] = max(worst.get(name, 1.0), factor)

    def of(passes: tuple[Pass, ...]) -> tuple[float, ...]:
        names = list(map(pass_name, passes))
        return slowdown.get(" + ".join(names)) or tuple(worst.get(name, 1.0) for name in names)

    return LaneTimes(shared_s, of)


def _short(value: float) -> float:
    """Six digits, more than any prediction is good for."""
    return float(f"{value:.6g}")
