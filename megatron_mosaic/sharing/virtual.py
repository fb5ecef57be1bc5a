"""Lanes on a host: work runs at once, checked and timed as if lanes ran beside each other."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from time import perf_counter
from typing import NamedTuple

import torch

from megatron_mosaic.schedule.lanes import MAIN
from megatron_mosaic.schedule.races import Event, VectorClocks
from megatron_mosaic.sharing.lane import Lanes, Quota

Now = Callable[[], float]
"""A clock of which only differences matter, in seconds."""


class VirtualEvent(NamedTuple):
    """What a lane has done so far.

    Args:
        done: Of every lane, the work that has ended for sure.
        time_s: When that is on the lanes' own clock.
    """

    done: Event
    time_s: float


class VirtualLane:
    """A lane with clocks in place of a device.

    What is launched in it runs at once, in the order of the launches. Its vector clock knows only
    what events say, so that whoever reports accesses to the clocks learns of each that a device
    could run too early. Its time goes on by what work inside takes here, and by what it waits for:
    lanes that took turns on the host would have ended at the largest of their times if each had
    a host of its own.

    Args:
        quota: What the lane may use; nothing limits it here.
        clocks: Those of all lanes of the rank.
        now: The host's clock.
    """

    def __init__(self, quota: Quota, *, clocks: VectorClocks, now: Now = perf_counter) -> None:
        self.name = quota.lane
        self.sms = quota.sms
        self.time_s = 0.0
        self._clocks = clocks
        self._now = now
        self._depth = 0

    @contextmanager
    def active(self, *, whole: bool = False) -> Iterator[None]:
        """Takes the time of what runs inside."""
        began_s = self._now()
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            if not self._depth:
                self.time_s += self._now() - began_s

    def record(self) -> VirtualEvent:
        """Returns an event of what was launched in the lane so far."""
        return VirtualEvent(self._clocks.record(self.name), self.time_s)

    def wait(self, event: VirtualEvent) -> None:
        """Lets what is launched in the lane from now on wait for an event."""
        self._clocks.wait(self.name, event.done)
        self.time_s = max(self.time_s, event.time_s)

    def hold(self, tensor: torch.Tensor) -> None:
        """Does nothing: memory of a host is counted by references."""


def virtual_lanes(quotas: Sequence[Quota], *, now: Now = perf_counter) -> Lanes:
    """Opens lanes that find races and run one after the other."""
    clocks = VectorClocks()
    return Lanes(
        main=VirtualLane(Quota(lane=MAIN), clocks=clocks, now=now),
        named={quota.lane: VirtualLane(quota, clocks=clocks, now=now) for quota in quotas},
        backend="virtual",
        races=clocks,
    )
