"""What a rank runs on, by name."""

import os
import platform
from pathlib import Path

import torch
from torch.cuda import nccl

from megatron_mosaic.errors import HostError
from megatron_mosaic.profile.measurements import Device


def describe_device(device: torch.device, *, ranks_per_node: int) -> Device:
    """Describes the device of this rank.

    Args:
        device: A GPU, or the CPU that the node's ranks share.
        ranks_per_node: Ranks of the node.
    """
    software = {"torch": torch.__version__, "python": platform.python_version()}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        versions = {
            "CUDA": str(torch.version.cuda),
            "driver": _driver_version(),
            "NCCL": ".".join(map(str, nccl.version())),
        }
        return Device(
            kind="cuda",
            name=properties.name,
            memory_bytes=float(properties.total_memory),
            num_sms=properties.multi_processor_count,
            software=software | versions,
            compute_capability=(properties.major, properties.minor),
        )
    cores = len(os.sched_getaffinity(0))
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Device(
        kind="cpu",
        name=_processor_name(),
        memory_bytes=memory_bytes / ranks_per_node,
        num_sms=max(1, cores // ranks_per_node),
        software=software | {"kernel": platform.release()},
    )


def find_device(kind: str | None, *, local_rank: int) -> torch.device:
    """Returns the device of a rank.

    Args:
        kind: ``"cpu"``, ``"cuda"``, or None for a GPU if there is one.
        local_rank: Rank on this node.

    Raises:
        HostError: There is no such GPU.
    """
    if kind == "cpu" or (kind is None and not torch.cuda.is_available()):
        return torch.device("cpu")
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if local_rank >= found:
        raise HostError(
            f"profile: device=cuda:{local_rank} must be one of the {found} GPUs of this machine; "
            f"use --device cpu or fewer ranks"
        )
    return torch.device("cuda", local_rank)


def _driver_version() -> str:
    """Version of NVIDIA's kernel module, which Linux lists."""
    listed = Path("/proc/driver/nvidia/version")
    words = listed.read_text().split() if listed.exists() else []
    return next((word for word in words if word[:1].isdigit() and "." in word), "unknown")


def _processor_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
