"""P1: what operations take on some of the SMs, alone."""

import json
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.sharing.arms import FAILURES
from benchmarks.sharing.lanes import LaneBank
from benchmarks.sharing.multiplexing import failure
from benchmarks.sharing.operations import Operation, operations
from benchmarks.sharing.setting import Budget, Setting, median_s, synchronize
from megatron_mosaic.sharing.lane import Lane, Lanes

SM_COUNTS = (8, 16, 32, 48, 64, 68, 84, 100, 116)
"""Quotas of an H200 that are measured beside the whole GPU."""

PROFILED = (32, 64)
"""Quotas on which grids are read, beside the whole GPU: do libraries fit them to a lane?"""

IN_A_ROW = 10
"""Launches that are timed together."""

LANE = "operation"


def measure(setting: Setting) -> Iterator[dict[str, Any]]:
    """Measures every operation on every quota, and on the whole GPU."""
    budget, bank = Budget(seconds=setting.budget_s), LaneBank(setting)
    legal = setting.quotas()
    counts = [sms for sms in (legal if setting.tiny else SM_COUNTS) if sms in legal]
    for operation in operations(setting):
        for sms in (*counts, setting.num_sms):
            row = {"operation": operation.name, "kind": operation.kind, "sms": sms}
            if budget.spent:
                yield row | {"skipped": budget.told()}
                continue
            try:
                quota = None if sms == setting.num_sms else sms
                lanes = bank.lanes("green", {LANE: quota})
                yield row | measure_operation(operation, lanes, setting, sms=sms)
            except FAILURES as error:
                yield row | {"failed": failure(error)}


def measure_operation(
    operation: Operation, lanes: Lanes, setting: Setting, *, sms: int
) -> dict[str, Any]:
    """Seconds of one launch, plainly and with libraries told how many SMs to leave alone."""
    run = in_lane(lanes, {LANE: operation.run})
    found: dict[str, Any] = {
        "flops": operation.work.flops,
        "bytes": operation.work.num_bytes,
        "median_s": repeated_s(run, setting),
    }
    if setting.tiny:
        return found | {"grids": None, "needs": "a GPU for grids and carve-outs"}
    if sms in PROFILED or sms == setting.num_sms:
        found["grids"] = grid_sizes(run, setting.device)
    if operation.kind.startswith("matmul") and sms < setting.num_sms:
        found["carved_out_s"] = carved_out_s(run, setting, sms=setting.num_sms - sms)
    return found


def repeated_s(run: Callable[[], None], setting: Setting, *, times: int = IN_A_ROW) -> float:
    """Median seconds of one launch of a row of them."""
    repeats, warm_up = setting.rounds, setting.warm_up
    return median_s(run, setting.device, repeats=repeats, warm_up=warm_up) / times


def in_lane(
    lanes: Lanes, runs: Mapping[str, Callable[[], Any]], *, times: int = IN_A_ROW
) -> Callable[[], None]:
    """Returns what launches operations in their lanes some times, between waits for the others."""

    def run() -> None:
        begun = lanes.main.record()
        for name, launch in runs.items():
            lane = lanes.named[name]
            lane.wait(begun)
            with lane.active():
                for _ in range(times):
                    launch()
            lanes.main.wait(lane.record())

    return run


def carved_out_s(run: Callable[[], None], setting: Setting, *, sms: int) -> float | None:
    """Seconds while libraries are told to leave some SMs alone; None where torch has no such way.

    It holds for the whole process, and torch calls it an experiment.
    """
    carve: Any = getattr(torch._C, "_set_sm_carveout_experimental", None)
    if carve is None:
        return None
    carve(sms)
    try:
        return repeated_s(run, setting)
    finally:
        carve(None)


def grid_sizes(run: Callable[[], None], device: torch.device) -> dict[str, int] | str:
    """Thread blocks of every kernel that was launched, or why the profiler does not see them."""
    try:
        return _traced_grids(run, device)
    except RuntimeError as error:
        return failure(error)


def _traced_grids(run: Callable[[], None], device: torch.device) -> dict[str, int]:
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as traced:
        run()
        synchronize(device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        traced.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    return blocks_of(events)


def blocks_of(events: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Thread blocks of the kernels in a trace, by the beginning of their names."""
    found = {}
    for event in events:
        if event.get("cat") == "kernel":
            found[event["name"][:60]] = math.prod(event["args"]["grid"])
    return found


def lane_seconds(lane: Lane, launch: Callable[[], Any], *, times: int) -> tuple[Any, Any]:
    """Launches in a lane between two timing events, which it returns."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with lane.active():
        start.record()
        for _ in range(times):
            launch()
        end.record()
    return start, end


def summary(row: Mapping[str, Any]) -> str:
    """One line while it runs."""
    told = row.get("skipped") or row.get("failed") or f"{1e6 * row['median_s']:.1f} us"
    return f"{row['operation']:30} {row['sms']:4} SMs  {told}"
