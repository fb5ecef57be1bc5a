"""Lanes that are CUDA streams, and lanes that are none."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from math import inf
from typing import Any

import torch

from megatron_mosaic.errors import HostError
from megatron_mosaic.schedule.lanes import MAIN
from megatron_mosaic.sharing.lane import Lanes, Quota

Activate = Callable[[Any], AbstractContextManager[Any]]
"""Makes a stream the current one, as ``torch.cuda.stream`` does."""


class NoLane:
    """Runs what is launched where the training loop launches, in the same order: no lane at all.

    Args:
        name: Name of the lane that it stands for.
    """

    sms = None

    def __init__(self, name: str) -> None:
        self.name = name

    def active(self, *, whole: bool = False) -> AbstractContextManager[None]:
        """Changes nothing."""
        return nullcontext()

    def record(self) -> None:
        """Returns no event: nothing runs beside anything."""

    def wait(self, event: None) -> None:
        """Does nothing."""

    def hold(self, tensor: torch.Tensor) -> None:
        """Does nothing: memory is given away in the order of the launches."""


class MainLane:
    """The stream that is current for the training loop, whichever that is."""

    name = MAIN
    sms = None

    def active(self, *, whole: bool = False) -> AbstractContextManager[None]:
        """Changes nothing."""
        return nullcontext()

    def record(self) -> torch.Event:
        """Returns an event of what the training loop has launched so far."""
        return torch.cuda.current_stream().record_event()

    def wait(self, event: torch.Event) -> None:
        """Makes what the training loop launches from now on wait for an event."""
        torch.cuda.current_stream().wait_event(event)

    def hold(self, tensor: torch.Tensor) -> None:
        """Keeps the memory of a lane's tensor until the training loop's work so far is done."""
        tensor.record_stream(torch.cuda.current_stream())


class StreamLane:
    """A lane of two streams: one with its quota, one on the whole GPU.

    Work of the lane runs in the order in which it was launched, whichever of the two it is on:
    where it goes over from one to the other, the other waits.

    Memory needs no more than that. What the allocator gives to work of one stream it gives anew
    only to later work of the same stream. Between the two, work of the other stream that reads
    the tensor was launched; the later work was launched after the lane came back, and waits for
    all of it.

    Autograd runs a backward pass on the streams of its forward pass, and orders them with the
    stream that is current around it. So what runs on the whole GPU in both passes must be
    launched whole in both.

    Args:
        name: Name of the lane.
        stream: Where it runs beside other lanes.
        whole: Where it runs alone; the same one if it has no quota.
        sms: What the device says that ``stream`` has; None is all.
        activate: Makes a stream the current one; None is torch's own.
    """

    def __init__(
        self,
        name: str,
        *,
        stream: Any,
        whole: Any = None,
        sms: int | None = None,
        activate: Activate | None = None,
    ) -> None:
        self.name = name
        self.sms = sms
        self._beside = stream
        self._whole = stream if whole is None else whole
        self._last = stream
        self._active: Any = None
        self._activate = torch.cuda.stream if activate is None else activate

    @contextmanager
    def active(self, *, whole: bool = False) -> Iterator[None]:
        """Launches in the lane what the caller launches inside; may be called inside itself."""
        outer, stream = self._active, self._whole if whole else self._beside
        self._go_over(stream)
        self._active = stream
        try:
            with self._activate(stream):
                yield
        finally:
            self._active = outer
            if outer is not None:
                self._go_over(outer)

    def _go_over(self, stream: Any) -> None:
        if stream is not self._last:
            stream.wait_event(self._last.record_event())
            self._last = stream

    def record(self) -> Any:
        """Returns an event: the lane has done all that was launched in it so far."""
        return self._last.record_event()

    def wait(self, event: Any) -> None:
        """Makes what is launched in the lane from now on wait for an event."""
        self._last.wait_event(event)

    def hold(self, tensor: torch.Tensor) -> None:
        """Keeps the memory of another lane's tensor until the lane's work so far is done."""
        # The allocator waits for the stream as it stands when the tensor is freed. By then the
        # lane may have gone over to the other one, which does not reach back.
        for stream in {id(each): each for each in (self._beside, self._whole)}.values():
            tensor.record_stream(stream)


def serial_lanes(quotas: Sequence[Quota]) -> Lanes:
    """Opens no lanes: modules run one after the other. Works on every device."""
    return Lanes(
        main=NoLane(MAIN),
        named={quota.lane: NoLane(quota.lane) for quota in quotas},
        backend="serial",
    )


def stream_lanes(quotas: Sequence[Quota], *, device: torch.device) -> Lanes:
    """Opens lanes that share all SMs of a GPU, none before another."""
    named = {
        quota.lane: StreamLane(quota.lane, stream=torch.cuda.Stream(device)) for quota in quotas
    }
    return Lanes(main=MainLane(), named=named, backend="streams")


def priority_lanes(quotas: Sequence[Quota], *, device: torch.device) -> Lanes:
    """Opens lanes that share all SMs of a GPU, the thread blocks of some before those of others.

    Raises:
        HostError: The device knows one priority only.
    """
    streams: Any = torch.cuda.Stream  # torch's types know no static methods
    least, greatest = streams.priority_range()
    if least == greatest:
        raise HostError(
            f"{device}: stream priorities {least}..{greatest} must differ to run one lane before "
            f"another; use --mosaic-sharing streams or serial"
        )
    named = {
        quota.lane: StreamLane(quota.lane, stream=torch.cuda.Stream(device, priority=priority))
        for quota, priority in zip(quotas, priorities(quotas), strict=True)
    }
    return Lanes(main=MainLane(), named=named, backend="priority")


def priorities(quotas: Sequence[Quota]) -> tuple[int, ...]:
    """Priorities of streams: the last lanes have 0, those before them less.

    Lanes go by the priority that they ask for, then by their quotas: the whole GPU first, then
    the larger part, so that a small module fills what a large one leaves.
    """
    asked = [(quota.priority, -inf if quota.sms is None else -quota.sms) for quota in quotas]
    classes = sorted(set(asked))
    return tuple(classes.index(each) - len(classes) + 1 for each in asked)
