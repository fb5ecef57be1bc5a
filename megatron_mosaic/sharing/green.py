"""Lanes with SMs of their own: streams of green contexts that come from one split."""

from collections.abc import Sequence
from typing import Any

import torch

from megatron_mosaic.cluster.sm_partition import REMAINDER, Granularity, granularity, split_for
from megatron_mosaic.sharing.driver import (
    GreenStream,
    QuotaError,
    check_sms,
    check_version,
    green_streams,
    load_driver,
)
from megatron_mosaic.sharing.lane import Lanes, Quota
from megatron_mosaic.sharing.streams import MainLane, StreamLane, priorities

# The first driver and bindings with cuDevSmResourceSplit, which torch's own split calls.
_FIRST_WITH_SPLIT = 13010


def green_lanes(quotas: Sequence[Quota], *, device: torch.device) -> Lanes:
    """Opens lanes that have SMs of their own, and uncapped ones that use all.

    Where no lane has a quota there is nothing to split, and any driver will do.

    Raises:
        QuotaError: Bindings, driver or device cannot give the quotas.
        LayoutError: The device has no such quotas.
    """
    index = torch.cuda.current_device() if device.index is None else device.index
    capped = any(quota.sms is not None for quota in quotas)
    streams = _streams(quotas, index) if capped else [None] * len(quotas)
    return lanes_of_streams(quotas, streams, device=torch.device("cuda", index))


def _streams(quotas: Sequence[Quota], device: int) -> list[GreenStream | None]:
    driver = load_driver()
    torch.cuda.synchronize(device)  # makes the primary context, whose parts green contexts are
    sizes = granularity(torch.cuda.get_device_capability(device))
    contexts: Any = getattr(torch.cuda, "GreenContext", None)
    if not torch_splits(contexts, driver):
        return green_streams(quotas, device=device, sizes=sizes, driver=driver)
    num_sms = torch.cuda.get_device_properties(device).multi_processor_count
    return torch_streams(quotas, device=device, num_sms=num_sms, sizes=sizes, contexts=contexts)


def torch_splits(contexts: Any, driver: Any) -> bool:
    """Whether torch can make disjoint green contexts: from 2.15 on, with a driver of CUDA 13.1.

    ``GreenContext.create`` cannot: it splits anew at each call, so that two share SMs.
    """
    return (
        hasattr(contexts, "split")
        and hasattr(driver, "cuDevSmResourceSplit")
        and check_version(driver) >= _FIRST_WITH_SPLIT
    )


def torch_streams(
    quotas: Sequence[Quota], *, device: int, num_sms: int, sizes: Granularity, contexts: Any
) -> list[GreenStream | None]:
    """Makes the streams of ``green_streams`` with ``torch.cuda.GreenContext.split``.

    Raises:
        QuotaError: CUDA refuses, or gives other SMs than were asked for.
        LayoutError: The GPU can give no such quotas.
    """
    where = f"cuda:{device}"
    split = split_for([quota.sms for quota in quotas], num_sms=num_sms, sizes=sizes, where=where)
    capped = [lane for lane, parts in enumerate(split.parts) if parts]
    streams: list[GreenStream | None] = [None] * len(quotas)
    if not capped:
        return streams
    # Groups are made in turn. What no groups make up comes last, of any SMs that are left.
    capped.sort(key=lambda lane: split.parts[lane] == (REMAINDER,))
    try:
        made = contexts.split(
            num_sms=tuple(quotas[lane].sms for lane in capped),
            backfill=tuple(split.parts[lane] == (REMAINDER,) for lane in capped),
            device_id=device,
        )
    except RuntimeError as error:
        shown = " | ".join(str(quotas[lane].sms) for lane in capped)
        raise QuotaError(
            f"{where}: share.sms={shown} must be granted by the driver, but GreenContext.split "
            f"raised {' '.join(str(error).split())}; use --mosaic-sharing priority"
        ) from error
    for lane, context in zip(capped, made, strict=True):
        check_sms(context.sm_count, quotas[lane], where)
        stream = context.Stream()  # every call gives another one
        streams[lane] = GreenStream(stream.cuda_stream, context.sm_count, (context, stream))
    return streams


class GreenLane(StreamLane):
    """A lane whose stream belongs to a green context, which lives as long as the lane."""

    def __init__(self, name: str, *, green: GreenStream, device: torch.device, whole: Any) -> None:
        stream = torch.cuda.ExternalStream(green.handle, device=device)
        super().__init__(name, stream=stream, whole=whole, sms=green.sms)
        self._owners = green.owners


def lanes_of_streams(
    quotas: Sequence[Quota],
    streams: Sequence[GreenStream | None],
    *,
    device: torch.device,
) -> Lanes:
    """Makes lanes of streams with SMs of their own; one without has a stream on the whole GPU."""
    named: dict[str, StreamLane] = {}
    for quota, green, priority in zip(quotas, streams, priorities(quotas), strict=True):
        whole = torch.cuda.Stream(device, priority=priority)
        named[quota.lane] = (
            StreamLane(quota.lane, stream=whole)
            if green is None
            else GreenLane(quota.lane, green=green, device=device, whole=whole)
        )
    return Lanes(main=MainLane(), named=named, backend="green")
