"""Opens the lanes in which the modules of a rank run at the same time."""

import argparse
import importlib
import os
from collections.abc import Mapping

import torch
import torch.distributed as dist
from megatron.training.utils import print_rank_0

from megatron_mosaic.errors import HostError, LayoutError
from megatron_mosaic.host.meeting import Meeting
from megatron_mosaic.host.runtime import Runtime
from megatron_mosaic.layout.placement import LANGUAGE, ModulePlacement
from megatron_mosaic.layout.plan import Plan
from megatron_mosaic.layout.ranks import show_ranks
from megatron_mosaic.schedule.lanes import has_lanes, lanes_of
from megatron_mosaic.sharing.choose import MODES
from megatron_mosaic.sharing.choose import open_lanes as open_lanes_of
from megatron_mosaic.sharing.guards import CONNECTIONS, Environment, shares_workspace
from megatron_mosaic.sharing.lane import Lanes, Quota


def check_sharing(args: argparse.Namespace, plan: Plan) -> None:
    """Checks that a wish for how modules share GPUs is one, and that the plan has them share any.

    Raises:
        HostError: It is not, or the plan runs one module at a time.
    """
    mode, kind = args.mosaic_sharing, plan.schedule.kind
    if mode not in MODES:
        raise HostError(
            f"arguments: mosaic_sharing={mode} must be one of {', '.join(MODES)}; name one"
        )
    if mode != "auto" and not has_lanes(plan):
        raise HostError(
            f"arguments: mosaic_sharing={mode} must go with kind=concurrent, not {kind}, which "
            f"runs one module at a time; remove the option or change the plan"
        )


def open_lanes(meeting: Meeting, args: argparse.Namespace) -> Lanes | None:
    """Opens this rank's lanes; None where it runs one module at a time.

    Raises:
        SystemExit: Code 2, on every rank, if modules cannot share the GPU of some rank as asked.

    Note:
        All ranks must call it. There need not be any process group yet.
    """
    plan = meeting.plan
    if not has_lanes(plan):
        return None
    quotas, lanes, error = quotas_of(plan, args.rank), None, None
    try:
        if len(quotas) > 1:
            lanes = open_lanes_of(
                quotas,
                mode=args.mosaic_sharing,
                device=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
                environment=environment_of(args, plan, os.environ),
            )
    except (HostError, LayoutError) as failure:
        error = str(failure)
    meeting.agreement.settle("sharing", error)
    return lanes


def log_lanes(runtime: Runtime) -> None:
    """Says once, on rank 0, in what lanes the modules of all ranks run.

    Note:
        Collective over the world.
    """
    if not has_lanes(runtime.plan):
        return
    notes: list[str | None] = [None] * runtime.plan.world_size
    own = None if runtime.lanes is None else runtime.lanes.note
    dist.all_gather_object(notes, own, group=runtime.host_group)
    ranks_of: dict[str, list[int]] = {}
    for rank, note in enumerate(notes):
        if note is not None:
            ranks_of.setdefault(note, []).append(rank)
    if len(ranks_of) > 1:
        shown = [f"ranks {show_ranks(ranks)} {note}" for note, ranks in ranks_of.items()]
        print_rank_0(f"mosaic: {'; '.join(shown)}")
    else:
        print_rank_0(f"mosaic: {next(iter(ranks_of))}")


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


def environment_of(
    args: argparse.Namespace, plan: Plan, variables: Mapping[str, str]
) -> Environment:
    """Finds out what decides whether lanes work.

    Args:
        args: Megatron's arguments.
        plan: The plan.
        variables: Those of the process.
    """
    modules = [
        name
        for rank in range(plan.world_size)
        if len(own := lanes_of(plan, rank)) > 1
        for name in own
    ]
    sharing = {name: plan.modules[name] for name in dict.fromkeys(modules)}
    max_ctas = variables.get("NCCL_MAX_CTAS")
    return Environment(
        compute_capability=torch.cuda.get_device_capability()
        if torch.cuda.is_available()
        else None,
        device_max_connections=variables.get(CONNECTIONS),
        launch_blocking=variables.get("CUDA_LAUNCH_BLOCKING") == "1",
        model_parallel=tuple(
            name
            for name, placement in sharing.items()
            if max(placement.tensor_model_parallel_size, placement.context_parallel_size) > 1
        ),
        fp8=bool(args.fp8 or getattr(args, "fp4", None)),
        shared_workspace=args.transformer_impl != "local" and _shares_workspace(),
        # The engine's own transfers stand where Megatron's would wait for the device.
        batch_p2p_sync=False,
        collectives={
            name: placement.share.sms
            for name, placement in sharing.items()
            if placement.share is not None and _has_collectives(placement)
        },
        nccl_max_ctas=int(max_ctas) if max_ctas and max_ctas.isdecimal() else None,
    )


def _shares_workspace() -> bool:
    try:
        gemm = importlib.import_module("transformer_engine.pytorch.cpp_extensions.gemm")
    except ImportError:
        return False
    return shares_workspace(gemm)


def _has_collectives(placement: ModulePlacement) -> bool:
    """Whether the module's tasks run collectives of its own."""
    shape = placement.shape
    return max(shape.tp, shape.cp, placement.expert_shape.ep, placement.expert_shape.expt_tp) > 1
