"""Measures how operations share this machine's GPU, and puts it into a cluster's description."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from megatron_mosaic.cluster.sm_partition import granularity
from megatron_mosaic.cluster.spec import Cluster, Gpu
from megatron_mosaic.errors import HostError, LayoutError
from megatron_mosaic.profile.device import describe_device
from megatron_mosaic.profile.operations import SIZES
from megatron_mosaic.profile.sharing import time_pairs, time_parts
from megatron_mosaic.profile.sharing_fit import FittedSharing, fit_sharing
from megatron_mosaic.profile.timing import Stopwatch
from megatron_mosaic.sharing.green import green_lanes
from megatron_mosaic.sharing.guards import CONNECTIONS, Environment, objections
from megatron_mosaic.sharing.lane import Lanes, Quota

_QUICK = 4  # of how many quotas a quick measurement takes one


class MeasuredSharing(NamedTuple):
    """What was measured, and on what.

    Args:
        fitted: What follows from the measurements.
        compute_capability: Of the GPU.
    """

    fitted: FittedSharing
    compute_capability: tuple[int, int]


def measure_sharing(gpu: Gpu, *, quick: bool, date: str) -> MeasuredSharing:
    """Measures the first GPU of this machine.

    Args:
        gpu: As it is described so far.
        quick: Whether a few sizes and quotas are enough.
        date: Day of the measurement.

    Raises:
        HostError: There is no GPU, it cannot give quotas, or kernels cannot run at once.
        LayoutError: It is another one than the base's.
    """
    if not torch.cuda.is_available():
        raise HostError(
            "profile: device=cpu must be a GPU for --sharing, as quotas are of multiprocessors; "
            "run it on a machine with one"
        )
    device = torch.device("cuda", 0)
    facts = describe_device(device, ranks_per_node=1)
    check_device(gpu, num_sms=facts.num_sms)
    capability = torch.cuda.get_device_capability(device)
    check_environment(capability, os.environ)
    counts = grid(facts.num_sms, capability, quick=quick)
    torch.cuda.set_device(device)
    stopwatch = Stopwatch(device=device, budget_s=0.02 if quick else 0.1)
    sizes = SIZES["cuda", quick]

    def open_lanes(quotas: Sequence[Quota]) -> Lanes:
        return green_lanes(quotas, device=device)

    parts = list(time_parts(stopwatch, sizes, counts, num_sms=facts.num_sms, open_lanes=open_lanes))
    splits = splits_of(counts, num_sms=facts.num_sms)
    pairs = list(time_pairs(stopwatch, sizes, splits, open_lanes=open_lanes))
    source = f"megatron-mosaic profile --sharing, {date}: {facts.describe()}"
    fitted = fit_sharing(parts, pairs, num_sms=facts.num_sms, source=source)
    return MeasuredSharing(fitted, capability)


def check_environment(compute_capability: tuple[int, int], variables: Mapping[str, str]) -> None:
    """Checks that kernels of two lanes can run at the same time.

    Raises:
        HostError: A setting keeps them apart.
    """
    against = objections(
        Environment(
            compute_capability=compute_capability,
            device_max_connections=variables.get(CONNECTIONS),
            launch_blocking=variables.get("CUDA_LAUNCH_BLOCKING", "0") not in ("", "0"),
        )
    )
    if against:
        raise HostError(against[0])


def check_device(gpu: Gpu, *, num_sms: int) -> None:
    """Checks that what is measured is what the base describes.

    Raises:
        LayoutError: It has another number of multiprocessors.
    """
    if gpu.num_sms != num_sms:
        raise LayoutError(
            f"gpu {gpu.name}: num_sms={gpu.num_sms} must be {num_sms} as of the measured device; "
            f"name the cluster of this device with --base"
        )


def grid(num_sms: int, compute_capability: tuple[int, int], *, quick: bool) -> list[int]:
    """Quotas to measure: every size of a group, or a few of them."""
    sizes = granularity(compute_capability)
    every = list(range(max(sizes.least, sizes.multiple), num_sms, sizes.multiple))
    return every[:: _QUICK if quick else 1]


def splits_of(counts: Sequence[int], *, num_sms: int) -> list[tuple[int, int]]:
    """About a quarter, a half and three quarters for the first of two operations."""
    nearest = (min(counts, key=lambda sms: abs(sms - part * num_sms)) for part in (0.25, 0.5, 0.75))
    return [(sms, num_sms - sms) for sms in dict.fromkeys(nearest)]


def with_sharing(cluster: Cluster, measured: MeasuredSharing) -> Cluster:
    """A cluster whose GPU has the measured curves."""
    fitted, compute_capability = measured
    gpu = replace(cluster.gpu, sharing=fitted.curves, compute_capability=compute_capability)
    return replace(cluster, gpu=gpu)


def report(fitted: FittedSharing) -> Iterator[str]:
    """Yields lines for people: what was found, and how far off it is."""
    curves = fitted.curves
    yield f"bandwidth is full from {curves.bandwidth_knee:.0%} of the multiprocessors on"
    yield f"interference {curves.interference:.3g}"
    for kind, rates in curves.rates.items():
        yield f"{kind}: " + ", ".join(f"{sms}: {rate:.3g}" for sms, rate in rates.items())
    for every, error in fitted.rate_errors.items():
        left_out = "one number left out" if every == 1 else f"one of {every} numbers measured"
        yield f"mean error of times, {left_out}: {error:.1%}"
    if fitted.pair_error is not None:
        yield f"mean error beside others, each pair left out in turn: {fitted.pair_error:.1%}"
