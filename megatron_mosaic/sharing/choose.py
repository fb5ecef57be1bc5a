"""Which kind of lanes a run has: what ``--mosaic-sharing`` asks for, or what there is."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Literal

import torch

from megatron_mosaic.errors import HostError, LayoutError
from megatron_mosaic.sharing.green import green_lanes
from megatron_mosaic.sharing.guards import Environment, objections
from megatron_mosaic.sharing.lane import Lanes, Quota
from megatron_mosaic.sharing.streams import priority_lanes, serial_lanes, stream_lanes
from megatron_mosaic.sharing.virtual import virtual_lanes

Mode = Literal["auto", "strict", "green", "priority", "streams", "serial"]
MODES: tuple[Mode, ...] = ("auto", "strict", "green", "priority", "streams", "serial")

Open = Callable[[Sequence[Quota], torch.device], Lanes]

BACKENDS: Mapping[str, Open] = {
    "green": lambda quotas, device: green_lanes(quotas, device=device),
    "priority": lambda quotas, device: priority_lanes(quotas, device=device),
    "streams": lambda quotas, device: stream_lanes(quotas, device=device),
    "serial": lambda quotas, device: serial_lanes(quotas),
    "virtual": lambda quotas, device: virtual_lanes(quotas),
}
"""How lanes of each kind are opened."""

_ON_HOST = {"auto": "virtual", "strict": "virtual", "green": "virtual", "serial": "serial"}
_ON_GPU = {"strict": "green", "auto": "green"}


def open_lanes(
    quotas: Sequence[Quota],
    *,
    mode: Mode,
    device: torch.device,
    environment: Environment,
    backends: Mapping[str, Open] = BACKENDS,
) -> Lanes:
    """Opens the lanes of a rank.

    ``auto`` takes green contexts, else streams with priorities, else no lanes, and says why in
    the lanes' note. Every other mode is what it gets, or the run stops.

    Args:
        quotas: One for each lane.
        mode: What was asked for; ``strict`` is green contexts.
        device: Where the lanes are; a host has ``virtual`` ones.
        environment: Settings of the run, the same on every rank.
        backends: How lanes of each kind are opened.

    Raises:
        HostError: The mode cannot be had, with what to do.
        LayoutError: A quota is none that the device has.

    Note:
        Call it before any process group exists: ranks may then stop without each other.
    """
    against = () if mode == "serial" else objections(environment)
    if mode == "auto":
        return _best(quotas, device, against, backends)
    if against:
        raise HostError(against[0])
    backend = _backend(mode, device)
    return _noted(backends[backend](quotas, device), "")


def _backend(mode: Mode, device: torch.device) -> str:
    if device.type == "cuda":
        return _ON_GPU.get(mode, mode)
    if mode not in _ON_HOST:
        raise HostError(
            f"arguments: mosaic_sharing={mode} must have a GPU, not {device.type}; use auto"
        )
    return _ON_HOST[mode]


def _best(
    quotas: Sequence[Quota],
    device: torch.device,
    against: Sequence[str],
    backends: Mapping[str, Open],
) -> Lanes:
    """Opens the best lanes that there are; the note tells why it is not better ones."""
    if against:
        return _noted(backends["serial"](quotas, device), against[0])
    first = _backend("auto", device)
    try:
        return _noted(backends[first](quotas, device), "")
    except (HostError, LayoutError) as error:
        return _noted(backends["priority"](quotas, device), str(error))


def _noted(lanes: Lanes, why: str) -> Lanes:
    """Gives lanes the line that the log has of them."""
    shown = ", ".join(
        f"{lane.name} on {'all' if lane.sms is None else lane.sms} SMs"
        for lane in lanes.named.values()
    )
    meaning = {
        "green": f"green contexts: {shown}",
        "priority": "streams with priorities, no SM quotas",
        "streams": "streams, no SM quotas",
        "serial": "none, modules run one after the other",
        "virtual": f"virtual, on a host, checked for races: {shown}",
    }[lanes.backend]
    because = f" ({why})" if why else ""
    return replace(lanes, note=f"lanes: {meaning}{because}")
