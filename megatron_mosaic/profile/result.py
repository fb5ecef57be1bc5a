"""Turns measurements into the description of a cluster."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import groupby
from operator import attrgetter

from megatron_mosaic.cluster.spec import Cluster, Curve, Gpu, LinkTier
from megatron_mosaic.errors import LayoutError, PlanError
from megatron_mosaic.profile.fit import (
    FittedLink,
    FittedRate,
    fit_link,
    fit_rate,
    link_error,
    rounded,
)
from megatron_mosaic.profile.measurements import Measurements, Reach, TimedMessage

# Curves of what memory bounds: their sizes are bytes, not FLOPs.
MEMORY_CURVES = ("elementwise", "optimizer")


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
    gpu = replace(base.gpu, curves=_overridden(base.gpu, _curves(fitted, base.gpu)))
    return replace(base, gpu=gpu, tiers=_overridden_tiers(fitted, base))


def _new_cluster(fitted: Fitted) -> Cluster:
    measured, source = fitted.measurements, fitted.source
    if not fitted.links:
        raise PlanError(
            "profile: ranks=1 must be > 1 without --base, for one rank alone has no links to "
            "measure; name a cluster or start more ranks"
        )
    peaks: dict[str, float] = {}
    for curve, rate in fitted.rates.items():
        if curve not in MEMORY_CURVES:
            precision = curve.rpartition(".")[2]
            peaks[precision] = max(peaks.get(precision, 0.0), rate.limit_per_s)
    gpu = Gpu(
        name=measured.device.name,
        memory_bytes=measured.device.memory_bytes,
        matmul_flops_per_s=peaks,
        memory_bytes_per_s=max(
            rate.limit_per_s for name, rate in fitted.rates.items() if name in MEMORY_CURVES
        ),
        num_sms=measured.device.num_sms,
        curves={},
        sources={"all": f"{source}; peaks are the limits of the fastest operation"},
    )
    backend = "gloo" if measured.device.kind == "cpu" else "NCCL"
    near = LinkTier(
        name=f"{backend} in a node",
        span=measured.ranks_per_node if "far" in fitted.links else None,
        bandwidth_bytes_per_s=0.0,
        latency_s=0.0,
        curve=Curve(peak_share=1.0),
    )
    blank = {"near": near, "far": replace(near, name=f"{backend} between nodes", span=None)}
    return Cluster(
        name=measured.device.name,
        gpu=replace(gpu, curves=_curves(fitted, gpu)),
        gpus_per_node=measured.ranks_per_node,
        num_nodes=measured.num_nodes,
        tiers=tuple(
            _measured_tier(
                replace(blank[reach], bandwidth_bytes_per_s=link.bandwidth_bytes_per_s),
                link,
                source=source,
            )
            for reach, link in sorted(fitted.links.items(), reverse=True)
        ),
    )


def _curves(fitted: Fitted, gpu: Gpu) -> dict[str, Curve]:
    """Measured curves as shares of a GPU's peaks."""
    curves = {}
    for name, rate in fitted.rates.items():
        if name in MEMORY_CURVES:
            field, peak = "memory_bytes_per_s", gpu.memory_bytes_per_s
        else:
            precision = name.rpartition(".")[2]
            field = f"matmul_flops_per_s.{precision}"
            peak = gpu.matmul_flops_per_s.get(precision, gpu.matmul_flops_per_s["bf16"])
        curves[name] = Curve(
            peak_share=_share(rate.limit_per_s, peak, f"gpu {gpu.name}: {field}", what=name),
            half_size=rate.half_size,
            source=f"{fitted.source}; mean error {rate.error:.1%}",
        )
    return curves


def _share(rate: float, peak: float, where: str, *, what: str) -> float:
    if rate > peak * (1 + 1e-9):
        raise LayoutError(
            f"{where}={peak:.4g} must be >= the measured {what}={rate:.4g}; name the cluster of "
            f"this device with --base, or measure without it"
        )
    return min(rounded(rate / peak), 1.0)


def _overridden(gpu: Gpu, measured: Mapping[str, Curve]) -> dict[str, Curve]:
    """A measured ``attention.forward.bf16`` also takes the place of an ``attention.forward``."""
    hidden = {name.rpartition(".")[0] for name in measured if name not in MEMORY_CURVES}
    kept = {name: curve for name, curve in gpu.curves.items() if name not in hidden}
    return {**kept, **measured}


def _overridden_tiers(fitted: Fitted, base: Cluster) -> tuple[LinkTier, ...]:
    tiers = list(base.tiers)
    for reach, index in _places(fitted.links, base).items():
        tiers[index] = _measured_tier(tiers[index], fitted.links[reach], source=fitted.source)
    return tuple(tiers)


def _places(reaches: Iterable[Reach], base: Cluster) -> dict[Reach, int]:
    """Which of a cluster's tiers were measured: those in a node, and those of the whole."""
    places: dict[Reach, int] = {}
    for reach in reaches:
        span = base.gpus_per_node if reach == "near" else base.num_gpus
        places[reach] = base.tiers.index(base.tier(span))
    return places


def _measured_tier(tier: LinkTier, link: FittedLink, *, source: str) -> LinkTier:
    source = f"{source}; mean error {link.error:.1%}"
    share = _share(
        link.bandwidth_bytes_per_s,
        tier.bandwidth_bytes_per_s,
        f"tiers: bandwidth_bytes_per_s of {tier.name}",
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
    """Yields rows of a table for people: what, sizes, fastest as measured, fit, and its error."""
    for name, rate in fitted.rates.items():
        timed = [it for it in fitted.measurements.operations if it.curve == name]
        unit, scale = ("GB/s", 1e9) if name in MEMORY_CURVES else ("TFLOP/s", 1e12)
        fastest = max(it.size / it.seconds for it in timed)
        yield (
            name,
            str(len(timed)),
            f"{fastest / scale:.3g} {unit}",
            f"{rate.limit_per_s / scale:.3g} {unit}, half at {rate.half_size:.2g}",
            f"{rate.error:.1%}",
        )
    for reach, link in fitted.links.items():
        messages = [it for it in fitted.measurements.messages if it.reach == reach]
        by_kind: dict[str, list[TimedMessage]] = {}
        for message in messages:
            by_kind.setdefault(message.collective, []).append(message)
        for kind, timed in by_kind.items():
            fastest = max(it.moved_bytes / it.seconds for it in timed)
            yield (
                f"{kind}, {reach}",
                str(len(timed)),
                f"{fastest / 1e9:.3g} GB/s",
                f"{link.bandwidth_bytes_per_s / 1e9:.3g} GB/s, {link.latency_s * 1e6:.3g} us",
                f"{link_error(link, timed):.1%}",
            )
