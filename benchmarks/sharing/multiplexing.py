"""P4: the same step in every arm, in turn, with gradients compared and losses reported."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from benchmarks.sharing.arms import (
    FAILURES,
    LARGEST_ERROR,
    Arm,
    Bench,
    affordable,
    cap_quotas,
    is_serial,
    lane_arms,
    planned_arm,
    serial_arms,
    split_quotas,
)
from benchmarks.sharing.capture import Captures
from benchmarks.sharing.cases import cases_for
from benchmarks.sharing.choice import Planned, planned
from benchmarks.sharing.lanes import LaneBank
from benchmarks.sharing.runner import alone
from benchmarks.sharing.sensors import Sensors, medians
from benchmarks.sharing.setting import Budget, Setting, median_s
from benchmarks.sharing.stats import (
    Interval,
    arm_row,
    bound_s,
    fastest,
    gain_interval,
    in_turns,
    median_interval,
    noise,
)
from benchmarks.sharing.work import Work, counted
from megatron_mosaic.planner.legal_sizes import divisors

SCAN_REPEATS = 3
"""Steps of each split before the best one is measured anew, beside all arms."""

MOST_SPLITS = 15
"""Splits that are scanned: all of two lanes on 132 SMs; of more lanes those nearest to the
modules' shares of the time."""

MOST_SWAPPED = 2
"""Splits that are scanned with the remainder for the other one of two modules."""

MOST_CAPS = 8
"""Caps of the encoders that are scanned."""


def measure(
    setting: Setting, *, cluster: str, only: Sequence[str] = ()
) -> Iterator[dict[str, Any]]:
    """Measures the cases, as many as time allows.

    Args:
        setting: Where.
        cluster: What the planner takes the GPU for.
        only: Cases whose names contain one of these; none is all.
    """
    budget, longest_s = Budget(seconds=setting.budget_s), 0.0
    bank, peaks = LaneBank(setting), ceilings(setting)
    for case in cases_for(setting):
        if only and not any(each in case.name for each in only):
            continue
        if budget.left_s <= longest_s:
            yield {"case": case.name, "skipped": budget.told()}
            continue
        before_s = budget.left_s
        bench = Bench(case, setting, bank)
        choices = [planned(case, graphs=graphs, cluster=cluster) for graphs in (False, True)]
        yield measure_case(bench, choices=choices, peaks=peaks)
        del bench
        free_cached(setting)
        longest_s = max(longest_s, before_s - budget.left_s)


def measure_case(
    bench: Bench, *, choices: Sequence[Planned], peaks: Mapping[str, float]
) -> dict[str, Any]:
    """Measures one case: modules alone, a scan of quotas, then all arms in turn.

    Args:
        bench: The case.
        choices: The planner's, for steps that are launched and for those that are captured.
        peaks: What the device reaches.
    """
    case, setting = bench.case, bench.setting
    alone_s = {
        name: median_s(
            alone(bench.modules, bench.batch, name), setting.device, repeats=3, warm_up=1
        )
        for name in case.modules
    }
    work = counted(bench.run_of(Arm(name="A")))
    scan = scan_quotas(bench, alone_s)
    arms = [
        *serial_arms(case),
        *lane_arms(split=best_of(scan, "split"), cap=best_of(scan, "cap")),
        *(
            planned_arm(own, graphs=graphs)
            for own, graphs in zip(choices, (False, True), strict=True)
        ),
    ]
    rows = take_turns(bench, arms)
    return {
        "case": case.name,
        "on_host": setting.tiny,
        "modules": list(case.modules),
        "num_microbatches": case.num_microbatches,
        "alone_s": alone_s,
        "scan": scan,
        "planned": {"G": choices[0].written(), "G'": choices[1].written()},
        "arms": rows,
        **_compared(rows, alone_s=alone_s, work=work, peaks=peaks),
    }


def scan_quotas(bench: Bench, alone_s: Mapping[str, float]) -> list[dict[str, Any]]:
    """Times every split, and every cap of the encoders alone; captured where that is possible."""
    case, setting = bench.case, bench.setting
    splits = nearest_splits(setting.splits(len(case.modules)), [alone_s[m] for m in case.modules])
    caps = [sms for sms in setting.quotas() if sms * len(case.encoders) <= setting.num_sms]
    graphs = not setting.tiny
    arms = [
        *(Arm(name="split", sms=split_quotas(case, split)) for split in splits),
        *(Arm(name="cap", sms=cap_quotas(case, sms)) for sms in thinned(caps, MOST_CAPS)),
    ]
    found = [_scanned(bench, replace(arm, mode="green", graphs=graphs)) for arm in arms]
    best = best_of(found, "split")
    if best is not None and len(case.modules) == 2:
        tried = [own for own in best.sms.values() if own is not None]
        swapped = nearest_swapped(setting.splits(2), tried)
        found += [_scanned(bench, replace(best, sms=split_quotas(case, own))) for own in swapped]
    for kind in ("split", "cap"):
        best = best_of(found, kind)
        groups = divisors(case.num_microbatches)[1:] if best else []
        found += [_scanned(bench, replace(best, encoder_group=group)) for group in groups if best]
    return found


def _scanned(bench: Bench, arm: Arm) -> dict[str, Any]:
    """Times an arm that gives its memory back: each has streams, and so memory, of its own."""
    row: dict[str, Any] = {"kind": arm.name, "median_s": None, "failed": None, **arm.written()}
    try:
        run = bench.run_of(arm, captures=Captures(bench.setting.device))
        row["median_s"] = median_s(run, bench.setting.device, repeats=SCAN_REPEATS, warm_up=1)
        del run
    except FAILURES as error:
        row["failed"] = failure(error)
    free_cached(bench.setting)
    return row


def free_cached(setting: Setting) -> None:
    """Gives memory that nothing uses back to the device."""
    if setting.device.type == "cuda":
        torch.cuda.empty_cache()


def nearest_swapped(splits: Sequence[Sequence[int]], best: Sequence[int]) -> list[tuple[int, ...]]:
    """Splits the other way round, next to the best: the remainder goes to the other module."""
    others = [tuple(split[::-1]) for split in splits if list(split[::-1]) != list(best)]
    return sorted(others, key=lambda split: (abs(split[0] - best[0]), split))[:MOST_SWAPPED]


def thinned(values: Sequence[int], most: int) -> list[int]:
    """At most so many of ascending values, evenly, the first and the last among them."""
    if len(values) <= most:
        return list(values)
    return [values[round(i * (len(values) - 1) / (most - 1))] for i in range(most)]


def nearest_splits(
    splits: Sequence[Sequence[int]], alone_s: Sequence[float]
) -> list[Sequence[int]]:
    """Splits nearest to what each module takes of the time, in their order."""
    total_s, total_sms = sum(alone_s), sum(splits[0])

    def distance(split: Sequence[int]) -> float:
        return sum(
            abs(sms / total_sms - own_s / total_s)
            for sms, own_s in zip(split, alone_s, strict=True)
        )

    kept = sorted(splits, key=distance)[:MOST_SPLITS]
    return [split for split in splits if split in kept]


def best_of(scan: Sequence[Mapping[str, Any]], kind: str) -> Arm | None:
    """The fastest arm of a kind that was scanned."""
    ran = [row for row in scan if row["kind"] == kind and row["median_s"] is not None]
    if not ran:
        return None
    row = min(ran, key=lambda row: row["median_s"])
    names = ("mode", "sms", "graphs", "encoder_group")
    return Arm(name=kind, **{name: row[name] for name in names})


def take_turns(bench: Bench, arms: Sequence[Arm]) -> dict[str, dict[str, Any]]:
    """Runs the arms in turn; what an arm cannot do is noted, and the others go on."""
    rows: dict[str, dict[str, Any]] = {}
    runs: dict[str, Callable[[], None]] = {}
    fitting = affordable(arms, each_bytes=bench.step_bytes, free_bytes=bench.free_bytes())
    for arm in arms:
        rows[arm.name] = row = {**arm.written(), "failed": None}
        if arm.name not in fitting:
            row["failed"] = f"left out: {bench.step_bytes / 2**30:.0f} GiB for each arm"
            continue
        try:
            run = bench.run_of(arm)
            row["gradient_errors"] = bench.check(run)
            row["peak_bytes"] = bench.peak_bytes(arm, run)
        except FAILURES as error:
            row["failed"] = failure(error)
            continue
        runs[arm.name] = run
    sensors = Sensors(bench.setting.device)
    times_s: dict[str, list[float]] = {name: [] for name in runs}
    readings: dict[str, list[Any]] = {name: [] for name in runs}
    warm_up, rounds = bench.setting.warm_up, bench.setting.rounds
    # Every capture has given cached memory back: arms are warm only after the last of them.
    for turn, name in in_turns(list(runs), rounds=warm_up + rounds):
        seconds, reading = bench.timed_s(runs[name]), sensors.read()
        if turn >= warm_up:
            times_s[name].append(seconds)
            readings[name].append(reading)
    medians_s = {name: median_interval(own).estimate for name, own in times_s.items()}
    base = fastest(medians_s, [name for name in runs if is_serial(name)])
    for name in runs:
        base_s = times_s[base] if base is not None else None
        rows[name] |= arm_row(times_s[name], base_s=base_s)
        rows[name]["sensors"] = medians(readings[name])
    return rows


def _compared(
    rows: Mapping[str, Mapping[str, Any]],
    *,
    alone_s: Mapping[str, float],
    work: Work,
    peaks: Mapping[str, float],
) -> dict[str, Any]:
    """What the arms say together, beside what is possible at all."""
    medians_s = {name: row.get("median_s") for name, row in rows.items()}
    serial = fastest(medians_s, [name for name in rows if is_serial(name)])
    best = fastest(medians_s, [name for name in rows if name != "A again"])
    control: Interval | None = None
    if medians_s.get("A") and medians_s.get("A again"):
        control = gain_interval(rows["A"]["times_s"], rows["A again"]["times_s"])
    errors = {name: max(row["gradient_errors"].values())
              for name, row in rows.items() if row.get("gradient_errors")}  # fmt: skip
    total_s = sum(alone_s.values())
    return {
        "serial": serial,
        "best": best,
        "control": control and control.written(),
        "noise": control and noise(control),
        "gradients_agree": all(error <= LARGEST_ERROR for error in errors.values()),
        "largest_gradient_error": max(errors.values(), default=None),
        "work": work._asdict(),
        "ideal_gain": total_s / max(alone_s.values()),
        "roofline_gain": total_s
        / bound_s(
            flops=work.flops,
            num_bytes=work.num_bytes,
            flops_per_s=peaks["flops_per_s"],
            bytes_per_s=peaks["bytes_per_s"],
            alone_s=list(alone_s.values()),
        ),
        "ceilings": dict(peaks),
    }


def ceilings(setting: Setting) -> dict[str, float]:
    """Rates that the device reaches: a large matrix product, and a large copy."""
    size = 128 if setting.tiny else 8192
    a, b = (torch.randn(size, size, device=setting.device, dtype=setting.dtype) for _ in range(2))
    source = torch.randn(1 << (16 if setting.tiny else 30), device=setting.device)
    target = torch.empty_like(source)
    product_s, copy_s = (
        median_s(run, setting.device, repeats=5, warm_up=3)
        for run in (lambda: torch.matmul(a, b), lambda: target.copy_(source))
    )
    moved = 2 * source.numel() * source.element_size()
    return {"flops_per_s": 2 * size**3 / product_s, "bytes_per_s": moved / copy_s}


def failure(error: BaseException) -> str:
    """One line of what went wrong."""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def summary(row: Mapping[str, Any]) -> str:
    """One line while it runs."""
    if "skipped" in row:
        return f"{row['case']:26} skipped: {row['skipped']}"
    gains = (
        f"{name} {arm['gain']['estimate']:.3f}" if arm.get("gain") else f"{name} failed"
        for name, arm in row["arms"].items()
    )
    return f"{row['case']:26} of {row['serial']}: {'  '.join(gains)}"
