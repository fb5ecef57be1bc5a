"""What a GPU does on some of its multiprocessors, and beside others that use it as well."""

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from megatron_mosaic.cluster.spec import Gpu, SharingCurves
from megatron_mosaic.cost.efficiency import MEMORY_CURVES, find_curve
from megatron_mosaic.errors import PlanError

# Kinds of operations of which another one's measured rates stand in.
_ALIKE = {
    "grouped_matmul": "matmul",
    "latent_attention": "attention",
    "permute": "elementwise",
    "optimizer": "elementwise",
}


class Demand(NamedTuple):
    """What a pass takes of what it shares with others, while nothing is beside it.

    Args:
        bandwidth: Share of the memory's bandwidth that operations can reach.
        stall: Share of the pass's time that grows with the time of a byte.
        host: Share of its time in which the host launches it.
    """

    bandwidth: float
    stall: float
    host: float = 0.0


def sharing_of(gpu: Gpu) -> SharingCurves:
    """What is known about sharing a GPU.

    Raises:
        PlanError: Nothing is.
    """
    if gpu.sharing is None:
        raise PlanError(
            f"gpu {gpu.name}: sharing must be given for modules that run at the same time; "
            f"measure it with megatron-mosaic profile --sharing"
        )
    return gpu.sharing


def gpu_with(gpu: Gpu, *, sms: int, bandwidth_share: float = 1.0) -> Gpu:
    """A GPU that has some of another one's multiprocessors and memory bandwidth.

    Rates of operations fall; the time to launch each stays. A memory-bound one shows that time:
    ``half_size / limit``, as an operation takes ``(size + half_size) / limit``. What others cost
    beyond it, whatever their size, is of blocks that do not fill the GPU: on fewer multiprocessors
    they wait for each other, and are counted as if they always had.

    Args:
        gpu: The whole one.
        sms: Multiprocessors.
        bandwidth_share: Part of the bandwidth that they would otherwise have.

    Raises:
        PlanError: It is not known how the GPU does with some of its multiprocessors.
    """
    if sms == gpu.num_sms and bandwidth_share == 1:
        return gpu
    sharing, launch_s = sharing_of(gpu), _launch_s(gpu)
    curves = {}
    for name, curve in gpu.curves.items():
        rate = rate_share(sharing, name, sms=sms, num_sms=gpu.num_sms)
        rate *= bandwidth_share if name in MEMORY_CURVES else 1.0
        launched = min(curve.half_size, launch_s * _limit_per_s(gpu, name))
        curves[name] = replace(
            curve,
            peak_share=rate * curve.peak_share,
            half_size=curve.half_size - (1 - rate) * launched,
        )
    return replace(gpu, curves=curves)


def _launch_s(gpu: Gpu) -> float:
    curve = find_curve(gpu, "elementwise", "bf16")
    return curve.half_size / _limit_per_s(gpu, "elementwise")


def _limit_per_s(gpu: Gpu, name: str) -> float:
    """FLOPs or bytes per second of large operations."""
    share = gpu.curves[name].peak_share
    if name in MEMORY_CURVES:
        return share * gpu.memory_bytes_per_s
    last = name.rpartition(".")[2]
    peaks = gpu.matmul_flops_per_s
    return share * peaks.get(last, peaks["bf16"])


def rate_share(sharing: SharingCurves, curve: str, *, sms: int, num_sms: int) -> float:
    """Rate of large operations on some multiprocessors, over that on all of them.

    As measured, and between two measured numbers on the line that joins them. Otherwise what
    computes goes with the multiprocessors, and what memory bounds with them up to the knee.

    Args:
        sharing: What is known.
        curve: Name of the operation's efficiency curve.
        sms: Multiprocessors that it has.
        num_sms: All of them.
    """
    for kind in _kinds(curve):
        if kind in sharing.rates:
            return _between(sharing.rates[kind], sms=sms, num_sms=num_sms)
    part = sms / num_sms
    return min(1.0, part / sharing.bandwidth_knee) if curve in MEMORY_CURVES else part


def _kinds(curve: str) -> Iterator[str]:
    """Kinds of which a curve may be, the closest first."""
    forward = curve.removeprefix("weight_gradient.")
    kind, dot, rest = forward.partition(".")
    for name in dict.fromkeys([curve, forward, _ALIKE.get(kind, kind) + dot + rest]):
        while name and name != "weight_gradient":
            yield name
            name = name.rpartition(".")[0]


def _between(rates: Mapping[int, float], *, sms: int, num_sms: int) -> float:
    known = {0: 0.0, num_sms: 1.0, **rates}
    counts = sorted(known)
    place = bisect_left(counts, sms)
    more = counts[place]
    if more == sms:
        return known[more]
    fewer = counts[place - 1]
    part = (sms - fewer) / (more - fewer)
    return known[fewer] + part * (known[more] - known[fewer])


def sms_beside(quotas: Sequence[int | None], *, num_sms: int) -> list[int]:
    """Multiprocessors that passes at work on a GPU have of it.

    Each has its quota, or all where it has none. Where that is more than there are, they share
    in proportion and nothing idles: what has no quota gets most of the GPU, and slows the others
    too, as their quotas are a cap and not a reservation. The scheduler of thread blocks promises
    nothing of the kind; it is the mean over operations of which all fill what they are given.

    Args:
        quotas: Of each of the passes.
        num_sms: Multiprocessors of the GPU.
    """
    wanted = [num_sms if quota is None else quota for quota in quotas]
    room = min(1.0, num_sms / sum(wanted))
    return [max(1, int(room * sms)) for sms in wanted]


def slowdowns(
    demands: Sequence[Demand], stretches: Sequence[float], *, interference: float
) -> tuple[float, ...]:
    """How many times as long passes take that are at work at the same time.

    Beyond the bandwidth, what waits for memory takes as many times longer as there is too much
    demand; and the more, the more others use caches and memory. One thread launches for all: what
    is as fast as its launches are is as much slower as they are too many.

    Args:
        demands: Of each pass with the multiprocessors that it wants.
        stretches: How many times as long each takes with those that it gets.
        interference: Of the GPU, as ``SharingCurves`` has it.
    """
    total = sum(demand.bandwidth for demand in demands)
    crowd = max(1.0, total) - 1
    launches = max(1.0, sum(demand.host for demand in demands))
    found = []
    for demand, stretch in zip(demands, stretches, strict=True):
        others = min(1.0, total - demand.bandwidth)
        longer = (stretch + crowd * demand.stall) * (1 + interference * others * demand.stall)
        found.append(max(longer, launches * demand.host))
    return tuple(found)
