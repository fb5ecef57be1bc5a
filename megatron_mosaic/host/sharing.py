"""Opens the lanes in which the modules of a rank run at the same time."""

import argparse

import torch

from megatron_mosaic.errors import HostError, LayoutError
from megatron_mosaic.host.meeting import Meeting
from megatron_mosaic.layout.placement import LANGUAGE
from megatron_mosaic.layout.plan import Plan
from megatron_mosaic.schedule.lanes import has_lanes, lanes_of
from megatron_mosaic.sharing.lane import Lanes, Quota
from megatron_mosaic.sharing.virtual import virtual_lanes


def open_lanes(meeting: Meeting, args: argparse.Namespace) -> Lanes | None:
    """Opens this rank's lanes; None where it runs one module at a time.

    Raises:
        SystemExit: Code 2, on every rank, if modules cannot share the GPU of some rank as asked.

    Note:
        All ranks must call it. There need not be any process group yet.
    """
    if not has_lanes(meeting.plan):
        return None
    quotas = quotas_of(meeting.plan, args.rank)
    if len(quotas) < 2:
        return None
    return virtual_lanes(quotas)


def quotas_of(plan: Plan, rank: int) -> list[Quota]:
    """What each module on a rank may use of its GPU.

    The language model goes first where nothing else decides: its pipeline is what other ranks
    wait for.
    """
    quotas = []
    for name in lanes_of(plan, rank):
        share = plan.modules[name].share
        sms = None if share is None else share.sms
        quotas.append(Quota(lane=name, sms=sms, priority=-1 if name == LANGUAGE else 0))
    return quotas
