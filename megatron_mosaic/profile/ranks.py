"""Runs the measurements on ranks: those that torchrun started, or ranks of its own."""

import os
import pickle
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import Progress
from torch.multiprocessing.spawn import ProcessException, spawn

from megatron_mosaic.errors import HostError
from megatron_mosaic.profile.device import describe_device, find_device
from megatron_mosaic.profile.layer import LAYER_SIZES, time_layer
from megatron_mosaic.profile.links import MESSAGE_BYTES, Peers, make_peers, time_messages
from megatron_mosaic.profile.measurements import Measurements, TimedMessage, TimedOperation
from megatron_mosaic.profile.operations import SIZES, Sizes, num_operations, operations
from megatron_mosaic.profile.timing import Stopwatch

_TIMEOUT = timedelta(minutes=5)
_NUM_COLLECTIVES = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class ProfileSettings:
    """What is to be measured.

    Args:
        device: ``"cpu"``, ``"cuda"``, or None for GPUs if there are any.
        quick: Whether a few small sizes are enough.
    """

    device: str | None
    quick: bool

    @property
    def budget_s(self) -> float:
        """Time for one operation of one size."""
        return 0.02 if self.quick else 0.3


@dataclass(frozen=True, kw_only=True, slots=True)
class _Place:
    """Where a rank is among the others."""

    rank: int
    world_size: int
    local_rank: int
    ranks_per_node: int


def launched_rank() -> int | None:
    """Rank of this process if torchrun started it."""
    return int(os.environ["RANK"]) if "RANK" in os.environ else None


def measure(settings: ProfileSettings, *, nproc: int | None) -> Measurements | None:
    """Measures on the ranks that torchrun started, or on ranks of its own on this machine.

    Args:
        settings: What to measure.
        nproc: Own ranks; None is one for each GPU, or two on a CPU.

    Returns:
        The measurements; None on launched ranks but the first.

    Raises:
        HostError: There are fewer GPUs than ranks, or a rank failed.

    Note:
        Collective over the world where torchrun started it.
    """
    rank = launched_rank()
    if rank is None:
        return _measure_on_own_ranks(settings, nproc=nproc)
    world_size = int(os.environ["WORLD_SIZE"])
    place = _Place(
        rank=rank,
        world_size=world_size,
        local_rank=int(os.environ.get("LOCAL_RANK", rank)),
        ranks_per_node=int(os.environ.get("LOCAL_WORLD_SIZE", world_size)),
    )
    return _measure(settings, place, init_method="env://")


def _measure_on_own_ranks(settings: ProfileSettings, *, nproc: int | None) -> Measurements | None:
    device = find_device(settings.device, local_rank=0)
    if nproc is None:
        nproc = torch.cuda.device_count() if device.type == "cuda" else 2
    find_device(settings.device, local_rank=nproc - 1)
    if nproc == 1:
        alone = _Place(rank=0, world_size=1, local_rank=0, ranks_per_node=1)
        return _measure(settings, alone, init_method=None)
    with tempfile.TemporaryDirectory(prefix="mosaic-profile-") as folder:
        try:
            spawn(_run_rank, args=(settings, nproc, folder), nprocs=nproc)
        except ProcessException as error:
            reason = str(error).strip().splitlines()[-1]
            raise HostError(
                f"profile: ranks={nproc} must all measure, not end with '{reason}'; "
                f"look at their output, or use --nproc 1"
            ) from None
        return pickle.loads((Path(folder) / "measurements").read_bytes())


def _run_rank(rank: int, settings: ProfileSettings, nproc: int, folder: str) -> None:
    place = _Place(rank=rank, world_size=nproc, local_rank=rank, ranks_per_node=nproc)
    measured = _measure(settings, place, init_method=f"file://{folder}/rendezvous")
    if measured is not None:
        (Path(folder) / "measurements").write_bytes(pickle.dumps(measured))


def _measure(
    settings: ProfileSettings, place: _Place, *, init_method: str | None
) -> Measurements | None:
    """Measures as one of some ranks. Returns the measurements on rank 0."""
    device = find_device(settings.device, local_rank=place.local_rank)
    facts = describe_device(device, ranks_per_node=place.ranks_per_node)
    stopwatch = Stopwatch(device=device, budget_s=settings.budget_s)
    key = (device.type, settings.quick)
    with (
        _using(device, num_threads=facts.num_sms),
        _joined(device, place, init_method=init_method) as peers,
        _progress(place) as progress,
    ):
        timed = _time_operations(stopwatch, SIZES[key], progress)
        progress.add_task("a whole layer", total=None)
        layer = time_layer(LAYER_SIZES[key], stopwatch)
        messages = _time_links(peers, MESSAGE_BYTES[key], stopwatch, progress)
    if place.rank != 0:
        return None
    return Measurements(
        device=facts,
        operations=timed,
        messages=messages,
        ranks_per_node=place.ranks_per_node,
        num_nodes=place.world_size // place.ranks_per_node,
        quick=settings.quick,
        layer=layer,
    )


@contextmanager
def _using(device: torch.device, *, num_threads: int) -> Iterator[None]:
    """Makes a GPU the current one, or gives a CPU's rank its share of the cores."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _joined(
    device: torch.device, place: _Place, *, init_method: str | None
) -> Iterator[list[Peers]]:
    """Meets the other ranks, if there are any. Gives the groups whose links are measured."""
    if init_method is None:
        yield []
        return
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        init_method=init_method,
        rank=place.rank,
        world_size=place.world_size,
        timeout=_TIMEOUT,
    )
    try:
        yield make_peers(ranks_per_node=place.ranks_per_node)
    finally:
        dist.destroy_process_group()


def _progress(place: _Place) -> Progress:
    """Shows rank 0's progress on standard error."""
    console = Console(file=sys.stderr, quiet=place.rank != 0)
    return Progress(console=console, disable=place.rank != 0)


def _time_operations(
    stopwatch: Stopwatch, sizes: Sizes, progress: Progress
) -> tuple[TimedOperation, ...]:
    device = stopwatch.device
    bar = progress.add_task("operations", total=num_operations(device, sizes))
    timed = []
    for operation in operations(device, sizes):
        progress.update(bar, description=f"operations: {operation.curve}")
        seconds = stopwatch.median_s(operation.prepare())
        timed.append(TimedOperation(operation.curve, operation.size, seconds, operation.smallest))
        progress.advance(bar)
    return tuple(timed)


def _time_links(
    peers: list[Peers], sizes: tuple[int, ...], stopwatch: Stopwatch, progress: Progress
) -> tuple[TimedMessage, ...]:
    bar = progress.add_task("links", total=len(peers) * len(sizes) * _NUM_COLLECTIVES)
    timed = []
    for each in peers:
        for message in time_messages(each, sizes, stopwatch):
            progress.update(bar, description=f"links: {message.collective}, {message.reach}")
            timed.append(message)
            progress.advance(bar)
    return tuple(timed)
