"""Lanes of one device: what the engine launches work in, and what a backend provides."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from megatron_mosaic.schedule.races import VectorClocks


@dataclass(frozen=True, kw_only=True, slots=True)
class Quota:
    """What a lane may use of its device while other lanes are at work.

    Args:
        lane: Name of the lane.
        sms: Multiprocessors; None is no cap.
        priority: Lower goes first where nothing else decides; it preempts nothing.
    """

    lane: str
    sms: int | None = None
    priority: int = 0


class Lane(Protocol):
    """Runs what is launched in it in that order, beside other lanes of its device.

    One thread launches for all lanes of a device.
    """

    @property
    def name(self) -> str:
        """Name of the lane."""
        ...

    @property
    def sms(self) -> int | None:
        """Multiprocessors that it has, as the device says; None is all."""
        ...

    def active(self, *, whole: bool = False) -> AbstractContextManager[None]:
        """Launches in the lane what the caller launches inside.

        Args:
            whole: On all multiprocessors, for work beside which nothing can run. Autograd runs
                a backward pass on the streams of its forward pass: the two must agree.
        """
        ...

    def record(self) -> Any:
        """Returns an event: the lane has done all that was launched in it so far."""
        ...

    def wait(self, event: Any) -> None:
        """Makes what is launched in the lane from now on wait for an event of another one."""
        ...

    def hold(self, tensor: torch.Tensor) -> None:
        """Keeps the memory of a tensor of another lane until this one's work so far is done."""
        ...


@dataclass(frozen=True, kw_only=True)
class Lanes:
    """All lanes of a rank.

    Args:
        main: Where the training loop itself launches: batches before, the optimizer after.
        named: The lanes of modules.
        backend: ``green``, ``priority``, ``streams``, ``serial`` or ``virtual``.
        note: How it came to this backend, one line for the log.
        races: Clocks of ``virtual`` lanes, to which the accesses of what they run are reported.
    """

    main: Lane
    named: Mapping[str, Lane]
    backend: str
    note: str = ""
    races: VectorClocks | None = None
