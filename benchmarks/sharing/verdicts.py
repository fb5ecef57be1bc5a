"""Results against what was to be shown; what was not measured is neither shown nor refuted."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from benchmarks.sharing.pairs import MODULE
from benchmarks.sharing.results import Results, rows_of
from benchmarks.sharing_prediction import TARGET, co_run_errors, parts_of

OF_BEST = 1.03
"""Steps of the planner's choice over those of the best measured arm."""

GAP_SHARE = 0.8
PAIR_GOAL, SET_GOAL = 1.15, 1.25
LEAST_PAIRS = 2
SET_SIZE = 4
"""Modules from which a case is a set of small ones."""


class Verdict(NamedTuple):
    """One line.

    Args:
        line: What was to be shown.
        holds: Whether it was; None is not measured.
        why: Numbers.
    """

    line: str
    holds: bool | None
    why: str


def verdicts(results: Results) -> list[Verdict]:
    """All lines, in the order of the parts."""
    steps = [row for row in rows_of(results, "p4") if row.get("arms")]
    return [
        disjoint(rows_of(results, "p0")),
        gradients(steps),
        near_best(steps),
        never_slower(steps),
        *contention(results),
        gaps_filled(rows_of(results, "p5")),
        goal(steps, least=2, most=2, gain=PAIR_GOAL),
        goal(steps, least=SET_SIZE, most=None, gain=SET_GOAL),
    ]


def disjoint(probes: Sequence[Mapping[str, Any]]) -> Verdict:
    """Whether kernels of lanes ran on SMs of their own, as many as were asked for."""
    splits = [
        row for probe in probes if probe["probe"] == "lanes" for row in probe.get("splits", ())
    ]
    seen = [row for row in splits if "counts" in row]
    right = [row for row in seen if row["disjoint"] and row["counts"] == row["asked"]]
    why = f"{len(right)} of {len(splits)} splits"
    return Verdict("lanes run on SMs of their own", _all(seen, len(right) == len(splits)), why)


def gradients(steps: Sequence[Mapping[str, Any]]) -> Verdict:
    """Whether every arm computed what the first one did."""
    off = [row["case"] for row in steps if not row["gradients_agree"]]
    largest = max((row["largest_gradient_error"] for row in steps), default=None)
    why = f"largest relative error {largest:.1e}" if largest is not None else "nothing ran"
    return Verdict("gradients agree in every arm", _all(steps, not off), why)


def near_best(steps: Sequence[Mapping[str, Any]]) -> Verdict:
    """Whether what the planner chose is about as fast as the best arm of all."""
    ratios = {}
    for row in measured(steps):
        chosen, best = planners_arm(row), row["arms"][row["best"]]
        if chosen is not None:
            ratios[row["case"]] = chosen["median_s"] / best["median_s"]
    why = _worst(ratios, max)
    return Verdict(
        "the planner's choice is within 3 % of the best arm",
        _all(ratios, all(ratio <= OF_BEST for ratio in ratios.values())),
        why,
    )


def never_slower(steps: Sequence[Mapping[str, Any]]) -> Verdict:
    """Whether what the planner chose is nowhere slower than the best serial arm, beyond noise."""
    gains, slower = {}, []
    for row in measured(steps):
        chosen = planners_arm(row)
        if chosen is not None:
            gains[row["case"]] = chosen["gain"]["estimate"]
            if chosen["gain"]["high"] < 1 - row["noise"]:
                slower.append(row["case"])
    return Verdict("the planner's choice is never below serial", _all(gains, not slower),
                   _worst(gains, min))  # fmt: skip


def contention(results: Results) -> list[Verdict]:
    """How far predicted times beside others are from measured ones, of operations and modules."""
    curves, pairs = rows_of(results, "p1"), rows_of(results, "p2")
    ran = [row for row in pairs if row.get("co_run_s")]
    found = []
    for told, of_modules in (("operations", False), ("modules", True)):
        line = f"times of pairs of {told} are predicted within 8 %, each held out"
        own = [row for row in ran if (MODULE in row["kinds"]) == of_modules]
        known = parts_of(curves)
        if len(own) < LEAST_PAIRS or not known:
            found.append(Verdict(line, None, "not measured"))
            continue
        num_sms = max(part.sms for part in known)
        errors = co_run_errors(curves, own, num_sms=num_sms)
        found.append(
            Verdict(line, errors.held_out <= TARGET, f"{errors.held_out:.1%} of {len(own)} pairs")
        )
    return found


def gaps_filled(rows: Sequence[Mapping[str, Any]]) -> Verdict:
    """Whether the best kind of lanes hides at least that share of what each gap can hide."""
    found: dict[str, float] = {}
    for row in rows:
        if row.get("recovered") is not None and row["arm"] != "serial":
            key = f"{row['case']}, gap {row['gap_of_encoder']:.2f} T_E"
            found[key] = max(found.get(key, row["recovered"]), row["recovered"])
    return Verdict(
        "gaps recover at least 80 % of min(gap, encoder)",
        _all(found, all(share >= GAP_SHARE for share in found.values())),
        _worst(found, min),
    )


def goal(
    steps: Sequence[Mapping[str, Any]], *, least: int, most: int | None, gain: float
) -> Verdict:
    """Whether any case gains so much over its best serial arm, in whichever arm."""
    gains = {}
    for row in measured(steps):
        count = len(row["modules"])
        if count >= least and (most is None or count <= most):
            arms = {
                name: arm["gain"]["estimate"]
                for name, arm in row["arms"].items()
                if arm.get("gain") and name[0] != "A"
            }
            if arms:
                gains[row["case"]] = max(arms.values())
    told = f"{least} modules" if most else f"{least} or more modules"
    return Verdict(
        f"a case of {told} gains {gain:.2f} times",
        _all(gains, any(each >= gain for each in gains.values())),
        _worst(gains, max),
    )


def measured(steps: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Cases that ran on a GPU: on a host lanes take turns, and times say nothing of them."""
    return [row for row in steps if not row["on_host"]]


def planners_arm(row: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What the planner chose, captured if that ran."""
    arms = [row["arms"].get(name) for name in ("G'", "G")]
    return next((arm for arm in arms if arm and arm.get("median_s")), None)


def _all(found: Sequence[Any] | Mapping[str, Any], holds: bool) -> bool | None:
    return holds if found else None


def _worst(values: Mapping[str, float], pick: Any) -> str:
    if not values:
        return "not measured"
    name = pick(values, key=lambda each: values[each])
    return f"{values[name]:.3f} with {name}"
