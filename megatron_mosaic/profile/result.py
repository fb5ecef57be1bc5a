"""Turns measurements into the description of a cluster."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from operator import attrgetter
from typing import get_args

from megatron_mosaic.cluster.spec import Cluster, Curve, Gpu, LinkTier
from megatron_mosaic.cost.efficiency import MEMORY_CURVES
from megatron_mosaic.errors import LayoutError, PlanError
from megatron_mosaic.model.spec import Precision
from megatron_mosaic.profile.fit import (
    FittedLink,
    FittedRate,
    fit_link,
    fit_rate,
    link_error,
    rounded,
)
from megatron_mosaic.profile.measurements import Measurements, Reach, TimedMessage


@dataclass(frozen=True, kw_only=True, slots=True)
class Fitted:
    """What follows from measurements.

    Args:
        measurements: What was measured.
        rates: By curve.
        links: By reach.
        source: Where the numbers are from, in a line.
    """

    measurements: Measurements
    rates: Mapping[str, FittedRate]
    links: Mapping[Reach, FittedLink]
    source: str

    @classmethod
    def of(cls, measurements: Measurements, *, date: str) -> "Fitted":
        """Fits everything that was measured.

        Args:
            measurements: At least one size of every operation.
            date: Day of the measurement.
        """
        by_curve = sorted(measurements.operations, key=attrgetter("curve"))
        by_reach = sorted(measurements.messages, key=attrgetter("reach"))
        return cls(
            measurements=measurements,
            rates={
                curve: fit_rate(list(timed))
                for curve, timed in groupby(by_curve, key=attrgetter("curve"))
            },
            links={
                reach: fit_link(list(timed))
                for reach, timed in groupby(by_reach, key=attrgetter("reach"))
            },
            source=f"megatron-mosaic profile, {date}: {measurements.device.describe()}",
        )

    def fastest_operation(self, curve: str) -> float:
        """Highest measured rate of an operation, in FLOPs or bytes per second."""
        return max(it.size / it.seconds for it in self.measurements.operations if it.curve == curve)

    def fastest_message(self, reach: Reach) -> float:
        """Highest measured rate over some links, in bytes per second."""
        messages = [it for it in self.measurements.messages if it.reach == reach]
        return max(it.moved_bytes / it.seconds for it in messages)


def measured_cluster(fitted: Fitted, base: Cluster | None) -> Cluster:
    """Describes the cluster on which something was measured.

    Args:
        fitted: What was measured.
        base: Says what was not: data sheet, other operations, other links, number of nodes. None
            makes the measured limits the peaks.

    Raises:
        LayoutError: A measured rate exceeds the base's data sheet.
        PlanError: There is no base, and links could not be measured.
    """
    if base is None:
        return _new_cluster(fitted)
    gpu = replace(base.gpu, curves={**base.gpu.curves, **_curves(fitted, base.gpu)})
    return replace(base, gpu=gpu, tiers=_overridden_tiers(fitted, base))


def _new_cluster(fitted: Fitted) -> Cluster:
    measured = fitted.measurements
    if not fitted.links:
        raise PlanError(
            "profile: ranks=1 must be > 1 without --base, for one rank alone has no links to "
            "measure; name a cluster or start more ranks"
        )
    gpu = Gpu(
        name=measured.device.name,
        memory_bytes=measured.device.memory_bytes,
        matmul_flops_per_s=_peaks(fitted),
        memory_bytes_per_s=max(map(partial(_peak, fitted), MEMORY_CURVES)),
        num_sms=measured.device.num_sms,
        compute_capability=measured.device.compute_capability,
        curves={},
        sources={"all": f"{fitted.source}; peaks are those of the fastest operation"},
    )
    return Cluster(
        name=measured.device.name,
        gpu=replace(gpu, curves=_with_stand_ins(_curves(fitted, gpu))),
        gpus_per_node=measured.ranks_per_node,
        num_nodes=measured.num_nodes,
        tiers=tuple(_new_tier(fitted, reach) for reach in ("near", "far") if reach in fitted.links),
    )


def _with_stand_ins(curves: Mapping[str, Curve]) -> dict[str, Curve]:
    """Adds what torch alone has no fast kernel for, with the curve of what is next to it."""
    latent = {
        f"latent_{name}": replace(curve, source=f"stands in: {name}, {curve.source}")
        for name, curve in curves.items()
        if name.startswith("attention.")
    }
    return {**curves, **latent}


def _peaks(fitted: Fitted) -> dict[str, float]:
    """Fastest multiplication or attention in each precision."""
    peaks: dict[str, float] = {}
    for curve in fitted.rates:
        if curve not in MEMORY_CURVES:
            precision = _precision(curve)
            peaks[precision] = max(peaks.get(precision, 0.0), _peak(fitted, curve))
    return peaks


def _peak(fitted: Fitted, curve: str) -> float:
    """Fitted limit of an operation, or what was measured if that is more."""
    if curve not in fitted.rates:
        return 0.0
    return max(fitted.rates[curve].limit_per_s, fitted.fastest_operation(curve))


def _new_tier(fitted: Fitted, reach: Reach) -> LinkTier:
    measured = fitted.measurements
    backend = "gloo" if measured.device.kind == "cpu" else "NCCL"
    fastest = max(fitted.links[reach].bandwidth_bytes_per_s, fitted.fastest_message(reach))
    tier = LinkTier(
        name=f"{backend} {'in a node' if reach == 'near' else 'between nodes'}",
        span=measured.ranks_per_node if reach == "near" and measured.num_nodes > 1 else None,
        bandwidth_bytes_per_s=fastest,
        latency_s=0.0,
        curve=Curve(peak_share=1.0),
    )
    return _measured_tier(tier, fitted, reach)


def _curves(fitted: Fitted, gpu: Gpu) -> dict[str, Curve]:
    """Measured curves as shares of a GPU's peaks."""
    curves = {}
    for name, rate in fitted.rates.items():
        if name in MEMORY_CURVES:
            field, peak = "memory_bytes_per_s", gpu.memory_bytes_per_s
        else:
            precision = _precision(name)
            field = f"matmul_flops_per_s.{precision}"
            peak = gpu.matmul_flops_per_s.get(precision, gpu.matmul_flops_per_s["bf16"])
        curves[name] = Curve(
            peak_share=_share(
                rate.limit_per_s,
                peak,
                fastest=fitted.fastest_operation(name),
                where=f"gpu {gpu.name}: {field}",
                what=name,
            ),
            half_size=rate.half_size,
            half_dim=rate.half_dim,
            source=f"{fitted.source}; mean error {rate.error:.1%}",
        )
    return curves


def _precision(curve: str) -> str:
    """Precision of a curve's operation: the end of its name, but for attention."""
    last = curve.rpartition(".")[2]
    return last if last in get_args(Precision) else "bf16"


def _share(limit: float, peak: float, *, fastest: float, where: str, what: str) -> float:
    """Share of a peak. A fit may go beyond the peak, what was measured may not."""
    if fastest > peak:
        raise LayoutError(
            f"{where}={peak:.4g} must be >= the measured {what}={fastest:.4g}; name the cluster of "
            f"this device with --base, or measure without it"
        )
    return min(rounded(limit / peak), 1.0)


def _overridden_tiers(fitted: Fitted, base: Cluster) -> tuple[LinkTier, ...]:
    """A base's links, with those that were measured: in a node, and those of the whole."""
    tiers = list(base.tiers)
    spans: Mapping[Reach, int] = {"near": base.gpus_per_node, "far": base.num_gpus}
    for reach, span in spans.items():
        if reach in fitted.links:
            index = base.tiers.index(base.tier(span))
            # Where both are the same links, those that reach further are the last word.
            tiers[index] = _measured_tier(base.tiers[index], fitted, reach)
    return tuple(tiers)


def _measured_tier(tier: LinkTier, fitted: Fitted, reach: Reach) -> LinkTier:
    link = fitted.links[reach]
    source = f"{fitted.source}; mean error {link.error:.1%}"
    share = _share(
        link.bandwidth_bytes_per_s,
        tier.bandwidth_bytes_per_s,
        fastest=fitted.fastest_message(reach),
        where=f"tiers: bandwidth_bytes_per_s of {tier.name}",
        what="bandwidth",
    )
    kept = f"bandwidth: {tier.source} ; latency: " if tier.source else ""
    return replace(
        tier,
        latency_s=link.latency_s,
        curve=Curve(peak_share=share, source=source),
        source=f"{kept}{source}",
    )


def table_rows(fitted: Fitted) -> Iterator[tuple[str, ...]]:
    """Yields rows of a table for people: what, sizes, fastest as measured, the fit, its error."""
    for name, rate in fitted.rates.items():
        timed = [it for it in fitted.measurements.operations if it.curve == name]
        unit, scale = ("GB/s", 1e9) if name in MEMORY_CURVES else ("TFLOP/s", 1e12)
        side = f", side {rate.half_dim:.2g}" if rate.half_dim else ""
        yield (
            name,
            str(len(timed)),
            f"{fitted.fastest_operation(name) / scale:.3g} {unit}",
            f"{rate.limit_per_s / scale:.3g} {unit}",
            f"half at {rate.half_size:.2g}{side}",
            f"{rate.error:.1%}",
        )
    by_kind: dict[tuple[Reach, str], list[TimedMessage]] = {}
    for message in fitted.measurements.messages:
        by_kind.setdefault((message.reach, message.collective), []).append(message)
    for (reach, kind), messages in by_kind.items():
        link = fitted.links[reach]
        fastest = max(it.moved_bytes / it.seconds for it in messages)
        yield (
            f"{kind}, {reach}",
            str(len(messages)),
            f"{fastest / 1e9:.3g} GB/s",
            f"{link.bandwidth_bytes_per_s / 1e9:.3g} GB/s",
            f"latency {link.latency_s * 1e6:.3g} us",
            f"{link_error(link, messages):.1%}",
        )
