"""Takes what `megatron-mosaic profile` measured into the GPU and cluster files of the package.

    megatron-mosaic profile measured.yaml --base h200 --sharing       # on such machines
    python -m tools.refresh_hardware measured.yaml --gpu h200 --cluster h200            # says what
    python -m tools.refresh_hardware measured.yaml --gpu h200 --cluster h200 --write    # does it

Numbers that the profile measured replace those of the files, each with the profile as its source.
All others keep their values and sources.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from megatron_mosaic.cluster import cluster_file
from megatron_mosaic.cluster.cluster_file import load_gpu, read_cluster, write_cluster
from megatron_mosaic.cluster.shipped import load_cluster
from megatron_mosaic.cluster.spec import Cluster, Gpu
from megatron_mosaic.errors import LayoutError, PlanError

FOLDER = Path(cluster_file.__file__).parent
_PROFILE = "megatron-mosaic profile"  # begins the source of what it measured


def refreshed_gpu(gpu: Gpu, measured: Gpu) -> Gpu:
    """Puts measured numbers in place of a GPU's own.

    Raises:
        PlanError: The measured one has another data sheet: shares of it mean something else.
    """
    for field in ("name", "num_sms", "memory_bytes_per_s", "matmul_flops_per_s"):
        own, other = getattr(gpu, field), getattr(measured, field)
        if own != other:
            raise PlanError(
                f"measured gpu: {field}={other} must be {own}, as of {gpu.name}; "
                f"profile with --base of a cluster of that GPU"
            )
    curves = {name: it for name, it in measured.curves.items() if _is_measured(it.source)}
    sharing = measured.sharing
    if sharing is None or not _is_measured(sharing.source):
        sharing = gpu.sharing
    return replace(gpu, curves={**gpu.curves, **curves}, sharing=sharing)


def refreshed_cluster(cluster: Cluster, measured: Cluster) -> Cluster:
    """Puts measured links in place of those of the same name."""
    found = {tier.name: tier for tier in measured.tiers if _is_measured(tier.curve.source)}
    return replace(cluster, tiers=tuple(found.get(tier.name, tier) for tier in cluster.tiers))


def changes(before: Any, after: Any, *, where: str) -> Iterator[str]:
    """Yields a line for every number that differs between two documents."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in {**before, **after}:
            yield from changes(before.get(key), after.get(key), where=f"{where}.{key}")
    elif isinstance(before, list) and isinstance(after, list):
        for index, (old, new) in enumerate(zip(before, after, strict=True)):
            yield from changes(old, new, where=f"{where}[{index}]")
    elif before != after:
        yield f"{where}: {before} -> {after}"


def gpu_text(gpu: Gpu) -> str:
    """Text of a file of `cluster/gpus/`: a line for each number and each curve."""
    return _text({"format": cluster_file.FORMAT, **_document(gpu)})


def cluster_text(cluster: Cluster, *, gpu: str) -> str:
    """Text of a file of `cluster/clusters/`, which names its GPU."""
    document = {**yaml.safe_load(write_cluster(cluster)), "gpu": gpu}
    return yaml.safe_dump(document, sort_keys=False, width=100)


def _is_measured(source: str) -> bool:
    return source.startswith(_PROFILE)


def _document(gpu: Gpu) -> dict[str, Any]:
    """A GPU as a file has it."""
    alone = Cluster(name="", gpu=gpu, gpus_per_node=1, num_nodes=1, tiers=())
    return yaml.safe_load(write_cluster(alone))["gpu"]


def _text(document: dict[str, Any]) -> str:
    lines = []
    for key, value in document.items():
        if key in ("curves", "sources", "sharing"):
            lines += [f"{key}:", *(f"  {name}: {_one_line(it)}" for name, it in value.items())]
        else:
            lines.append(f"{key}: {_one_line(value)}")
    return "\n".join([*lines, ""])


def _one_line(value: Any) -> str:
    written = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10**6)
    return written.removesuffix("\n...\n").strip()


def _refresh(path: Path, text: str, lines: Sequence[str], *, write: bool) -> None:
    print("\n".join(lines) if lines else f"{path.name}: nothing was measured")
    if write and lines:
        path.write_text(text, encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """Refreshes the named files. Returns 0, or 2 if the measured ones are of something else."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("measured", help="cluster file that megatron-mosaic profile wrote")
    parser.add_argument("--gpu", required=True, help="file of cluster/gpus/ to refresh")
    parser.add_argument("--cluster", help="file of cluster/clusters/ whose links to refresh")
    parser.add_argument("--write", action="store_true", help="write, not only say what")
    args = parser.parse_args(arguments)
    try:
        measured, gpu = read_cluster(args.measured), load_gpu(args.gpu)
        new = refreshed_gpu(gpu, measured.gpu)
        cluster = load_cluster(args.cluster) if args.cluster else None
    except (PlanError, LayoutError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    said = list(changes(_document(gpu), _document(new), where=args.gpu))
    _refresh(FOLDER / "gpus" / f"{args.gpu}.yaml", gpu_text(new), said, write=args.write)
    if cluster is not None:
        better = refreshed_cluster(cluster, measured)
        before, after = (yaml.safe_load(write_cluster(it))["tiers"] for it in (cluster, better))
        said = list(changes(before, after, where=f"{args.cluster}.tiers"))
        text = cluster_text(better, gpu=args.gpu)
        path = FOLDER / "clusters" / f"{args.cluster}.yaml"
        _refresh(path, text, said, write=args.write)
    return 0


if __name__ == "__main__":
    sys.exit(main())
