"""How a rank meets the others, before any process group exists."""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from megatron_mosaic.errors import LayoutError, PlanError
from megatron_mosaic.host.agreement import Agreement
from megatron_mosaic.host.rounds import new_round
from megatron_mosaic.layout.plan import Plan, check_world_size
from megatron_mosaic.schedule.build import build_schedule
from megatron_mosaic.schedule.verify import verify

# Verification of a larger world takes longer than the others wait; `megatron-mosaic check` does it.
_VERIFIED_RANKS = 256

_PATIENCE_S = 30.0  # as long as for what rank 0 says later

WORLD_SIZE = "{world_size}"
"""Stands in the name of a plan file for the number of ranks."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Meeting:
    """The rendezvous of a run.

    Args:
        store: Store that all ranks reach; Megatron's process group uses it too.
        agreement: Settles errors through the store.
        plan: The plan on which all ranks agreed.
    """

    store: dist.Store
    agreement: Agreement
    plan: Plan

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        """Pickles as None: it travels in Megatron's arguments, which go into checkpoints."""
        return type(None), ()


def meet(written: str) -> Meeting:
    """Reads the plan and makes sure that every rank read the same, and does what it says alike.

    Args:
        written: Path of the plan, as :func:`plan_path` takes it.

    Raises:
        SystemExit: Code 2, on every rank, if a rank cannot read its plan, the plan is for
            another number of ranks, or plans or the schedules made from them differ.
    """
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    os.environ.setdefault("MASTER_ADDR", "localhost")
    os.environ.setdefault("MASTER_PORT", "0" if world_size == 1 else "29500")
    plan, error, digest = None, None, ""
    try:
        path = plan_path(written, world_size=world_size)
        plan = Plan.load(path)
        check_world_size(plan, world_size, where=str(path))
        schedule = build_schedule(plan)
        digest = hashlib.sha256(f"{plan.digest()} {schedule.digest()}".encode()).hexdigest()
        if rank == 0 and world_size <= _VERIFIED_RANKS:
            # Plans are compared below, so one rank verifies for all.
            verify(plan, schedule)
    except (PlanError, LayoutError) as plan_error:
        error = str(plan_error)
    store = _store(rank, world_size)
    agreement = Agreement(store, rank=rank, world_size=world_size)
    agreement.settle("plan", error, digest=digest)
    assert plan is not None
    return Meeting(store=store, agreement=agreement, plan=plan)


def _store(rank: int, world_size: int) -> dist.Store:
    store, _, _ = next(iter(dist.rendezvous("env://", rank=rank, world_size=world_size)))
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        # The agent's outlives the ranks; any other is rank 0's own.
        return new_round(store, rank=rank, world_size=world_size, timeout_s=_PATIENCE_S)
    return store


def plan_path(written: str, *, world_size: int) -> Path:
    """The plan file for so many ranks: where the user wrote ``{world_size}``, their number is put.

    With plans for several sizes a run that torchrun restarts with fewer nodes takes the one that
    fits.

    Raises:
        PlanError: There is none for this number of ranks.
    """
    path = Path(written.replace(WORLD_SIZE, str(world_size)))
    if WORLD_SIZE in written and not path.is_file():
        raise PlanError(
            f"{path}: file must be there for a run of {world_size} ranks; make it with "
            f"megatron-mosaic plan --from PLAN --gpus {world_size} -o {path}"
        )
    return path
