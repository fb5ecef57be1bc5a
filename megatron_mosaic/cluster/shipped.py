"""Clusters that come with the package, by name."""

from dataclasses import replace
from importlib.resources import files
from pathlib import Path

from megatron_mosaic.cluster.cluster_file import parse_cluster, read_cluster
from megatron_mosaic.cluster.spec import Cluster
from megatron_mosaic.errors import LayoutError, PlanError
from megatron_mosaic.fields import nearest, show


def shipped_clusters() -> tuple[str, ...]:
    """Names of the clusters that ``load_cluster`` knows, sorted."""
    folder = files("megatron_mosaic.cluster") / "clusters"
    return tuple(sorted(file.name.removesuffix(".yaml") for file in folder.iterdir()))


def load_cluster(name: str, *, num_gpus: int | None = None) -> Cluster:
    """Loads a shipped cluster, or one from a file.

    Args:
        name: One of ``shipped_clusters()``, or the path of a cluster file.
        num_gpus: GPUs to use in place of all; ``None`` is as many as the file says.

    Raises:
        PlanError: Neither exists, or the file cannot be read.
        LayoutError: The file's numbers contradict each other, or nodes cannot be full.
    """
    if name in shipped_clusters():
        resource = files("megatron_mosaic.cluster") / "clusters" / f"{name}.yaml"
        cluster = parse_cluster(resource.read_text(encoding="utf-8"), where=f"cluster {name}")
    elif Path(name).suffix in (".yaml", ".yml"):
        cluster = read_cluster(name)
    else:
        advice = nearest(name, shipped_clusters(), otherwise="name a .yaml file")
        raise PlanError(
            f"cluster={show(name)} must be a file or one of {', '.join(shipped_clusters())}; "
            f"{advice}"
        )
    return cluster if num_gpus is None else resized(cluster, num_gpus=num_gpus)


def resized(cluster: Cluster, *, num_gpus: int) -> Cluster:
    """Gives a cluster another number of GPUs, in full nodes or as a part of one.

    Raises:
        LayoutError: The number is neither, or the cluster's links do not reach that far.
    """
    per_node = cluster.gpus_per_node
    if num_gpus < 1 or (num_gpus > per_node and num_gpus % per_node):
        raise LayoutError(
            f"cluster {cluster.name}: num_gpus={num_gpus} must be a multiple of "
            f"gpus_per_node={per_node}, or fewer; use {per_node * max(1, num_gpus // per_node)}"
        )
    last = cluster.tiers[-1]
    if last.span is not None and last.span < num_gpus:
        raise LayoutError(
            f"cluster {cluster.name}: num_gpus={num_gpus} must be <= span={last.span} of "
            f"{last.name}; add links to the cluster file"
        )
    per_node = min(per_node, num_gpus)
    return replace(cluster, gpus_per_node=per_node, num_nodes=num_gpus // per_node)


def cluster_of_size(name: str, *, num_gpus: int | None) -> Cluster:
    """Loads a cluster; a shipped one has as many full nodes as are needed for so many GPUs.

    Args:
        name: As ``load_cluster`` takes it.
        num_gpus: GPUs that are asked for; ``None`` is as many as there are.

    Raises:
        PlanError: The cluster does not exist, or its file cannot be read.
        LayoutError: The cluster's links do not reach that far.
    """
    cluster = load_cluster(name)
    if num_gpus is None or num_gpus < 1 or name not in shipped_clusters():
        return cluster
    per_node = cluster.gpus_per_node
    return resized(
        cluster, num_gpus=num_gpus if num_gpus < per_node else -(-num_gpus // per_node) * per_node
    )
