"""Cluster and GPU files: YAML to a ``Cluster`` and back."""

import re
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any, get_args

import yaml

from megatron_mosaic.cluster.sharing_file import check_sms, read_sharing, written_sharing
from megatron_mosaic.cluster.spec import Cluster, Curve, Gpu, LinkTier
from megatron_mosaic.errors import LayoutError, PlanError
from megatron_mosaic.fields import (
    Parse,
    check_format,
    mapping,
    nearest,
    number,
    parse_yaml,
    positive,
    read_keys,
    read_text,
    show,
    text,
)
from megatron_mosaic.model.spec import Precision

FORMAT = 1

_SOURCES = "sources"


def read_cluster(path: str | Path) -> Cluster:
    """Reads a cluster file.

    Raises:
        PlanError: There is no such file, it names an unknown GPU, or a key is unknown, missing
            or mistyped.
        LayoutError: Numbers contradict each other.
    """
    return parse_cluster(read_text(path), where=str(path))


def parse_cluster(source: str, *, where: str) -> Cluster:
    """Reads the text of a cluster file; messages begin with ``where``.

    Raises:
        PlanError: It names an unknown GPU, or a key is unknown, missing or mistyped.
        LayoutError: Numbers contradict each other.
    """
    try:
        return _read_cluster(parse_yaml(source))
    except (PlanError, LayoutError) as error:
        raise type(error)(f"{where}: {error}") from None


def shipped_gpus() -> tuple[str, ...]:
    """Names of the GPUs that a cluster file can refer to, sorted."""
    folder = files("megatron_mosaic.cluster") / "gpus"
    return tuple(sorted(file.name.removesuffix(".yaml") for file in folder.iterdir()))


def load_gpu(name: str) -> Gpu:
    """Loads a shipped GPU.

    Raises:
        PlanError: There is none of that name.
    """
    if name not in shipped_gpus():
        advice = nearest(name, shipped_gpus(), otherwise="write its numbers in place of a name")
        raise PlanError(f"gpu={show(name)} must be one of {', '.join(shipped_gpus())}; {advice}")
    resource = files("megatron_mosaic.cluster") / "gpus" / f"{name}.yaml"
    document = mapping("gpu", parse_yaml(resource.read_text(encoding="utf-8")))
    check_format(f"gpu {name}: ", document, known=FORMAT)
    return _read_gpu("gpu", {key: value for key, value in document.items() if key != "format"})


def _read_cluster(document: object) -> Cluster:
    written = mapping("cluster", document)
    check_format("", written, known=FORMAT)
    known: Mapping[str, Parse] = {
        "format": positive,
        "name": text,
        "gpu": lambda field, value: (
            load_gpu(value) if isinstance(value, str) else _read_gpu(field, value)
        ),
        "gpus_per_node": positive,
        "num_nodes": positive,
        "tiers": _tiers,
    }
    keys = read_keys("", written, known=known, required=tuple(known))
    _check_tiers(keys["tiers"], num_gpus=keys["gpus_per_node"] * keys["num_nodes"])
    return Cluster(
        name=keys["name"],
        gpu=keys["gpu"],
        gpus_per_node=keys["gpus_per_node"],
        num_nodes=keys["num_nodes"],
        tiers=keys["tiers"],
    )


def _read_gpu(field: str, value: object) -> Gpu:
    known: Mapping[str, Parse] = {
        "name": text,
        "memory_bytes": _rate,
        "matmul_flops_per_s": _peaks,
        "memory_bytes_per_s": _rate,
        "num_sms": positive,
        "curves": _curves,
        "host_operation_s": number,
        "host_expert_s": _waits,
        "overlap_cost": number,
        "compute_capability": _capability,
        "sharing": read_sharing,
        _SOURCES: _texts,
    }
    optional = (
        "host_operation_s",
        "host_expert_s",
        "overlap_cost",
        "compute_capability",
        "sharing",
    )
    required = tuple(key for key in known if key not in optional)
    keys = read_keys(f"{field}: ", mapping(field, value), known=known, required=required)
    gpu = Gpu(**keys)
    check_sms(field, gpu)
    return gpu


def _capability(field: str, value: object) -> tuple[int, int]:
    # YAML reads 9.0 as a number; the minor one has one digit.
    if not isinstance(value, float | str) or not re.fullmatch(r"\d+\.\d", str(value)):
        raise PlanError(f"{field}={show(value)} must be major.minor; write one such as 9.0")
    major, minor = str(value).split(".")
    return int(major), int(minor)


def _waits(field: str, value: object) -> Mapping[str, float]:
    known: Mapping[str, Parse] = {"bf16": number, "fp8": number}
    return read_keys(f"{field}: ", mapping(field, value), known=known, required=())


def _texts(field: str, value: object) -> Mapping[str, str]:
    if isinstance(value, str):
        return {"all": value}
    return {str(key): text(f"{field}.{key}", it) for key, it in mapping(field, value).items()}


def _rate(field: str, value: object) -> float:
    if number(field, value) == 0:
        raise PlanError(f"{field}={show(value)} must be > 0; write one such as 3.35e+12")
    return number(field, value)


def _share(field: str, value: object) -> float:
    if not 0 < number(field, value) <= 1:
        raise PlanError(f"{field}={show(value)} must be > 0 and <= 1; write one such as 0.8")
    return number(field, value)


def _peaks(field: str, value: object) -> Mapping[str, float]:
    known: Mapping[str, Parse] = dict.fromkeys(get_args(Precision), _rate)
    return read_keys(f"{field}: ", mapping(field, value), known=known, required=("bf16",))


def _curves(field: str, value: object) -> Mapping[str, Curve]:
    return {
        text(f"{field} key", name): _curve(f"{field}.{name}", curve)
        for name, curve in mapping(field, value).items()
    }


def _curve(field: str, value: object) -> Curve:
    known: Mapping[str, Parse] = {
        "peak_share": _share,
        "half_size": number,
        "half_dim": number,
        "source": text,
    }
    required = ("peak_share", "source")
    keys = read_keys(f"{field}: ", mapping(field, value), known=known, required=required)
    return Curve(**keys)


def _tiers(field: str, value: object) -> tuple[LinkTier, ...]:
    if not isinstance(value, list) or not value:
        raise PlanError(f"{field}={show(value)} must be a list of links; write at least one")
    return tuple(_tier(f"{field}[{index}]", tier) for index, tier in enumerate(value))


def _tier(field: str, value: object) -> LinkTier:
    known: Mapping[str, Parse] = {
        "name": text,
        "span": positive,
        "bandwidth_bytes_per_s": _rate,
        "latency_s": number,
        "curve": _curve,
        "source": text,
    }
    required = ("name", "bandwidth_bytes_per_s", "latency_s", "curve", "source")
    keys = read_keys(f"{field}: ", mapping(field, value), known=known, required=required)
    return LinkTier(span=keys.pop("span", None), **keys)


def _check_tiers(tiers: tuple[LinkTier, ...], *, num_gpus: int) -> None:
    spans = [tier.span for tier in tiers if tier.span is not None]
    if any(tier.span is None for tier in tiers[:-1]) or spans != sorted(set(spans)):
        listed = ", ".join(f"{tier.name}: {show(tier.span)}" for tier in tiers)
        raise LayoutError(
            f"tiers: span={listed} must rise from link to link; sort them, fastest first"
        )
    last = tiers[-1]
    if last.span is not None and last.span < num_gpus:
        raise LayoutError(
            f"tiers: span={last.span} of {last.name} must be >= the cluster's GPUs={num_gpus}; "
            f"remove span from the last links, or add others"
        )


def write_cluster(cluster: Cluster) -> str:
    """Writes a cluster, its GPU included, as YAML that ``parse_cluster`` gives back."""
    document = {
        "format": FORMAT,
        "name": cluster.name,
        "gpu": _written_gpu(cluster.gpu),
        "gpus_per_node": cluster.gpus_per_node,
        "num_nodes": cluster.num_nodes,
        "tiers": [_written_tier(tier) for tier in cluster.tiers],
    }
    return yaml.safe_dump(document, sort_keys=False, default_flow_style=None, width=100)


def _written_gpu(gpu: Gpu) -> dict[str, Any]:
    return {
        "name": gpu.name,
        "memory_bytes": gpu.memory_bytes,
        "matmul_flops_per_s": dict(gpu.matmul_flops_per_s),
        "memory_bytes_per_s": gpu.memory_bytes_per_s,
        "num_sms": gpu.num_sms,
        "curves": {name: _written_curve(curve) for name, curve in gpu.curves.items()},
        **({"host_operation_s": gpu.host_operation_s} if gpu.host_operation_s else {}),
        **({"host_expert_s": dict(gpu.host_expert_s)} if gpu.host_expert_s else {}),
        **({"overlap_cost": gpu.overlap_cost} if gpu.overlap_cost else {}),
        **_written_capability(gpu),
        **({"sharing": written_sharing(gpu.sharing)} if gpu.sharing else {}),
        _SOURCES: dict(gpu.sources),
    }


def _written_capability(gpu: Gpu) -> dict[str, float]:
    if gpu.compute_capability is None:
        return {}
    major, minor = gpu.compute_capability
    return {"compute_capability": float(f"{major}.{minor}")}


def _written_curve(curve: Curve) -> dict[str, Any]:
    return {
        "peak_share": curve.peak_share,
        "half_size": curve.half_size,
        **({"half_dim": curve.half_dim} if curve.half_dim else {}),
        "source": curve.source,
    }


def _written_tier(tier: LinkTier) -> dict[str, Any]:
    return {
        "name": tier.name,
        **({} if tier.span is None else {"span": tier.span}),
        "bandwidth_bytes_per_s": tier.bandwidth_bytes_per_s,
        "latency_s": tier.latency_s,
        "curve": _written_curve(tier.curve),
        "source": tier.source,
    }
