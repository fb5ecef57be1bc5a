"""P3: what lanes cost by themselves: to open, to enter, to go over, and for every event."""

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from benchmarks.sharing.arms import FAILURES
from benchmarks.sharing.lanes import LaneBank
from benchmarks.sharing.multiplexing import failure
from benchmarks.sharing.setting import Setting, synchronize, timed_s
from benchmarks.sharing.stats import median_interval
from megatron_mosaic.sharing.lane import Lanes

MODES = ("streams", "priority", "green")
TIMES = 200
"""Calls, or kernels, that are timed together."""


def measure(setting: Setting) -> Iterator[dict[str, Any]]:
    """Measures every kind of lanes."""
    split = setting.splits(2)[len(setting.splits(2)) // 2]
    sms = dict(zip(("first", "second"), split, strict=True))
    for mode in MODES:
        try:
            yield {"overhead": f"open, {mode}", "s": [_opened_s(setting, mode, sms)]}
            lanes = LaneBank(setting).lanes(mode, sms)
        except FAILURES as error:
            yield {"overhead": f"open, {mode}", "failed": failure(error)}
            continue
        for name, run, on_host in _runs(lanes, setting):
            yield {"overhead": f"{name}, {mode}", "sms": sms, "backend": lanes.backend,
                   **_measured(run, setting, on_host=on_host)}  # fmt: skip


def _opened_s(setting: Setting, mode: str, sms: Mapping[str, int]) -> float:
    """Seconds to open lanes that nobody has opened before, on a device that is at work already."""
    torch.zeros(1, device=setting.device)
    synchronize(setting.device)
    began_s = time.perf_counter()
    LaneBank(setting).lanes(mode, dict(sms))
    return time.perf_counter() - began_s


def _runs(lanes: Lanes, setting: Setting) -> Iterator[tuple[str, Callable[[], None], bool]]:
    """What is timed, by the host's clock where the host is what it costs."""
    first, second = lanes.named.values()
    small = torch.zeros(1, device=setting.device)

    def in_main() -> None:
        for _ in range(TIMES):
            small.add_(1)

    def in_lane() -> None:
        first.wait(lanes.main.record())
        with first.active():
            in_main()
        lanes.main.wait(first.record())

    def entered() -> None:
        for _ in range(TIMES):
            with first.active():
                small.add_(1)

    def gone_over() -> None:
        for number in range(TIMES):
            with first.active(whole=bool(number % 2)):
                small.add_(1)

    def handed_over() -> None:
        for number in range(TIMES):
            mine, other = (first, second) if number % 2 else (second, first)
            with mine.active():
                small.add_(1)
            other.wait(mine.record())

    yield "launch in the loop's stream", in_main, True
    yield "launch in a lane", in_lane, True
    yield "launch and enter a lane", entered, True
    yield "launch and change between quota and whole", gone_over, True
    yield "launch and hand over by an event", handed_over, True
    for name, run in (
        ("kernel in the loop's stream", in_main),
        ("kernel in a lane", in_lane),
        ("kernel and change between quota and whole", gone_over),
        ("kernel and hand over by an event", handed_over),
    ):
        yield name, _between_waits(lanes, run), False


def _between_waits(lanes: Lanes, run: Callable[[], None]) -> Callable[[], None]:
    """Lets lanes begin after the main one, and the main one end after them."""

    def whole() -> None:
        begun = lanes.main.record()
        for lane in lanes.named.values():
            lane.wait(begun)
        run()
        for lane in lanes.named.values():
            lanes.main.wait(lane.record())

    return whole


def _measured(run: Callable[[], None], setting: Setting, *, on_host: bool) -> dict[str, Any]:
    """Seconds of one call, and its interval."""
    if setting.tiny and not on_host:
        return {"needs": "a GPU"}
    times_s = []
    for _ in range(setting.warm_up + setting.rounds):
        if on_host:
            synchronize(setting.device)
            began_s = time.perf_counter()
            run()
            times_s.append((time.perf_counter() - began_s) / TIMES)
        else:
            times_s.append(timed_s(run, setting.device) / TIMES)
    synchronize(setting.device)
    return {"s": list(median_interval(times_s[setting.warm_up :])), "clock":
            "host" if on_host else "device"}  # fmt: skip


def summary(row: Mapping[str, Any]) -> str:
    """One line while it runs."""
    told = row.get("failed") or ("needs " + row["needs"] if "needs" in row else None)
    return f"{row['overhead']:55} {told or f'{1e6 * row["s"][0]:.2f} us'}"
