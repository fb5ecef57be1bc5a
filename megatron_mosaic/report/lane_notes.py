"""Reads what a plan file says of modules that run at the same time."""

from typing import Any

from megatron_mosaic.errors import PlanError
from megatron_mosaic.fields import mapping, show
from megatron_mosaic.layout.plan import Plan
from megatron_mosaic.planner.lane_notes import SEPARATOR, pass_text
from megatron_mosaic.schedule.graph import stage_order
from megatron_mosaic.schedule.simulate import LaneTimes, Pass, PassTimes


def read_lane_notes(plan: Plan, written: object) -> LaneTimes:
    """Reads the notes of lanes; passes that did not meet are taken not to mind each other.

    Raises:
        PlanError: They are not of that form.
    """
    notes = mapping("predicted.lanes", written)
    own_s = mapping("predicted.lanes.shared_s", notes.get("shared_s", {}))
    factors = mapping("predicted.lanes.slowdown", notes.get("slowdown", {}))
    shared_s = {}
    for stage in stage_order(plan):
        name = f"{stage.module}.{stage.stage}"
        shared_s[stage] = PassTimes(*_numbers(f"shared_s.{name}", own_s.get(name), count=2))
    shown = {
        pass_text(Pass(stage, back)): Pass(stage, back)
        for stage in shared_s
        for back in (False, True)
    }
    known: dict[tuple[Pass, ...], tuple[float, ...]] = {}
    for names, values in factors.items():
        parts = str(names).split(SEPARATOR)
        if not shown.keys() >= set(parts):
            raise _error(f"slowdown.{names}", values, "name passes of the plan's stages")
        passes = tuple(shown[part] for part in parts)
        known[passes] = _numbers(f"slowdown.{names}", values, count=len(passes))
    return LaneTimes(shared_s, lambda passes: known.get(passes, (1.0,) * len(passes)))


def _numbers(field: str, values: Any, *, count: int) -> tuple[float, ...]:
    numbers = values if isinstance(values, list) else []
    if len(numbers) != count or not all(type(n) in (int, float) and n >= 0 for n in numbers):
        raise _error(field, values, f"be {count} numbers >= 0")
    return tuple(map(float, numbers))


def _error(field: str, value: Any, rule: str) -> PlanError:
    return PlanError(
        f"predicted.lanes.{field}={show(value)} must {rule}; "
        f"plan again, or remove the key predicted"
    )
