"""Which kind of lanes a run has: what ``--mosaic-sharing`` asks for, or what there is."""

from collections.abc import Sequence
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

_ON_HOST = {"auto": "virtual", "strict": "virtual", "green": "virtual", "serial": "serial"}
_ON_GPU = {"strict": "green", "auto": "green"}


def open_lanes(
    quotas: Sequence[Quota],
    *,
    mode: Mode,
    device: torch.device,
    environment: Environment,
) -> Lanes:
    """Opens the lanes of a rank.

    ``auto`` takes green contexts, else streams with priorities, else no lanes, and says why in
    the lanes' note. Every other mode is what it gets, or the run stops.

    Args:
        quotas: One for each lane.
        mode: What was asked for; ``strict`` is green contexts.
        device: Where the lanes are; a host has ``virtual`` ones.
        environment: Settings of the run, the same on every rank.

    Raises:
        HostError: The mode cannot be had, with what to do.
        LayoutError: A quota is none that the device has.

    Note:
        Call it before any process group exists: ranks may then stop without each other.
    """
    against = () if mode == "serial" else objections(environment)
    if mode == "auto":
        return _best(quotas, device, against)
    if against:
        raise HostError(against[0])
    return _open(_backend(mode, device), quotas, device)


def _backend(mode: Mode, device: torch.device) -> str:
    if device.type == "cuda":
        return _ON_GPU.get(mode, mode)
    if mode not in _ON_HOST:
        raise HostError(
            f"arguments: mosaic_sharing={mode} must have a GPU, not {device.type}; use auto"
        )
    return _ON_HOST[mode]


def _best(quotas: Sequence[Quota], device: torch.device, against: Sequence[str]) -> Lanes:
    """Opens the best lanes that there are; the note tells why it is not better ones."""
    better = () if against else (_backend("auto", device), "priority")
    why = list(against[:1])
    for backend in better:
        try:
            return _open(backend, quotas, device, why="; ".join(why))
        except (HostError, LayoutError) as error:
            why.append(str(error))
    return _open("serial", quotas, device, why="; ".join(why))


def _open(backend: str, quotas: Sequence[Quota], device: torch.device, *, why: str = "") -> Lanes:
    match backend:
        case "green":
            lanes = green_lanes(quotas, device=device)
        case "priority":
            lanes = priority_lanes(quotas, device=device)
        case "streams":
            lanes = stream_lanes(quotas, device=device)
        case "virtual":
            lanes = virtual_lanes(quotas)
        case _:
            lanes = serial_lanes(quotas)
    return replace(lanes, note=_note(lanes, why))


def _note(lanes: Lanes, why: str) -> str:
    """The line that the log has of lanes."""
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
    return f"lanes: {meaning} ({why})" if why else f"lanes: {meaning}"
