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
CLOCKS = ("host", "device")
TIMES = 200
"""Launches that are timed together."""


def measure(setting: Setting) -> Iterator[dict[str, Any]]:
    """Measures every kind of lanes."""
    first, second = setting.splits(2)[len(setting.splits(2)) // 2]
    sms: dict[str, int | None] = {"first": first, "second": second}
    for mode in MODES:
        try:
            yield {"overhead": f"open, {mode}", "s": [_opened_s(setting, mode, sms)]}
            lanes = LaneBank(setting).lanes(mode, sms)
        except FAILURES as error:
            yield {"overhead": f"open, {mode}", "failed": failure(error)}
            continue
        launches = Launches(lanes, setting)
        for clock in CLOCKS:
            for name, run in launches.ways().items():
                row = {"overhead": f"{clock}: launch {name}, {mode}", "sms": sms, "clock": clock}
                yield row | _measured(launches.joined(run), setting, clock=clock)


def _opened_s(setting: Setting, mode: str, sms: Mapping[str, int | None]) -> float:
    """Seconds to open lanes that nobody has opened before, on a device that is at work already."""
    torch.zeros(1, device=setting.device)
    synchronize(setting.device)
    began_s = time.perf_counter()
    LaneBank(setting).lanes(mode, sms)
    return time.perf_counter() - began_s


class Launches:
    """Tiny kernels, launched in ways that differ in what lanes add.

    Args:
        lanes: Two lanes.
        setting: Where.
    """

    def __init__(self, lanes: Lanes, setting: Setting) -> None:
        self._lanes = lanes
        self._first, self._second = lanes.named.values()
        self._small = torch.zeros(1, device=setting.device)

    def ways(self) -> dict[str, Callable[[], None]]:
        """All of them, the plain one first."""
        return {
            "in the loop's stream": self._in_main,
            "in a lane": self._in_lane,
            "and enter a lane": self._entered,
            "and change between quota and whole": self._gone_over,
            "and hand over by an event": self._handed_over,
        }

    def joined(self, run: Callable[[], None]) -> Callable[[], None]:
        """Lets lanes begin after the loop's stream, and that go on after them."""

        def whole() -> None:
            begun = self._lanes.main.record()
            for lane in self._lanes.named.values():
                lane.wait(begun)
            run()
            for lane in self._lanes.named.values():
                self._lanes.main.wait(lane.record())

        return whole

    def _in_main(self) -> None:
        for _ in range(TIMES):
            self._small.add_(1)

    def _in_lane(self) -> None:
        with self._first.active():
            self._in_main()

    def _entered(self) -> None:
        for _ in range(TIMES):
            with self._first.active():
                self._small.add_(1)

    def _gone_over(self) -> None:
        for number in range(TIMES):
            with self._first.active(whole=bool(number % 2)):
                self._small.add_(1)

    def _handed_over(self) -> None:
        for number in range(TIMES):
            mine, other = (self._first, self._second)[:: 1 if number % 2 else -1]
            with mine.active():
                self._small.add_(1)
            other.wait(mine.record())


def _measured(run: Callable[[], None], setting: Setting, *, clock: str) -> dict[str, Any]:
    """Seconds of one launch: median, and its interval."""
    if setting.tiny and clock == "device":
        return {"needs": "a GPU"}
    times_s = [
        (_launched_s(run, setting) if clock == "host" else timed_s(run, setting.device)) / TIMES
        for _ in range(setting.warm_up + setting.rounds)
    ]
    return {"s": list(median_interval(times_s[setting.warm_up :]))}


def _launched_s(run: Callable[[], None], setting: Setting) -> float:
    """Seconds until the host has launched everything."""
    synchronize(setting.device)
    began_s = time.perf_counter()
    run()
    return time.perf_counter() - began_s


def summary(row: Mapping[str, Any]) -> str:
    """One line while it runs."""
    told = row.get("failed") or ("needs " + row["needs"] if "needs" in row else None)
    return f"{row['overhead']:55} {told or f'{1e6 * row["s"][0]:.2f} us'}"
