"""Lanes on a host: work runs at once, and is checked as if lanes ran beside each other."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch

from megatron_mosaic.schedule.lanes import MAIN
from megatron_mosaic.schedule.races import Event, VectorClocks
from megatron_mosaic.sharing.lane import Lanes, Quota


class VirtualLane:
    """A lane with a vector clock in place of a device.

    What is launched in it runs at once, in the order of the launches. Its clock knows only what
    events say, so that whoever reports accesses to the clocks learns of each that a device could
    run too early.

    Args:
        quota: What the lane may use; nothing limits it here.
        clocks: Those of all lanes of the rank.
    """

    def __init__(self, quota: Quota, *, clocks: VectorClocks) -> None:
        self.name = quota.lane
        self.sms = quota.sms
        self._clocks = clocks

    def active(self, *, whole: bool = False) -> AbstractContextManager[None]:
        """Changes nothing: a host runs what it is given."""
        return nullcontext()

    def record(self) -> Event:
        """Returns an event of what was launched in the lane so far."""
        return self._clocks.record(self.name)

    def wait(self, event: Event) -> None:
        """Lets what is launched in the lane from now on wait for an event."""
        self._clocks.wait(self.name, event)

    def hold(self, tensor: torch.Tensor) -> None:
        """Does nothing: memory of a host is counted by references."""


def virtual_lanes(quotas: Sequence[Quota]) -> Lanes:
    """Opens lanes that find races and run one after the other."""
    clocks = VectorClocks()
    return Lanes(
        main=VirtualLane(Quota(lane=MAIN), clocks=clocks),
        named={quota.lane: VirtualLane(quota, clocks=clocks) for quota in quotas},
        backend="virtual",
        races=clocks,
    )
