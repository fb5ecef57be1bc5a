"""What keeps modules from sharing a GPU: settings under which lanes would be wrong or idle."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

CONNECTIONS = "CUDA_DEVICE_MAX_CONNECTIONS"

# NCCL user guide, ncclConfig_t, maxCTAs: 32 if nobody sets it.
_NCCL_MAX_CTAS = 32
# Megatron-LM core 0.19, megatron/training/arguments.py: from Blackwell on it demands nothing.
_BLACKWELL = (10, 0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Environment:
    """What of a run decides whether lanes work, the same on every rank.

    Args:
        compute_capability: Of the GPU, major and minor; None without one.
        device_max_connections: ``CUDA_DEVICE_MAX_CONNECTIONS``, if it is set.
        launch_blocking: Whether ``CUDA_LAUNCH_BLOCKING`` is set.
        model_parallel: Modules with lanes whose tensor or context parallel size is above 1.
        fp8: Whether any module computes in FP8 or FP4.
        shared_workspace: Whether layers of modules with lanes are those of a TransformerEngine
            whose products share a workspace, as ``shares_workspace`` tells.
        batch_p2p_sync: Whether Megatron waits for the device after every transfer of a pipeline.
        collectives: Quotas of lanes in which collectives run, by lane: tensor, context or expert
            parallel groups.
        nccl_max_ctas: ``NCCL_MAX_CTAS``, if it is set.
    """

    compute_capability: tuple[int, int] | None = None
    device_max_connections: str | None = None
    launch_blocking: bool = False
    model_parallel: tuple[str, ...] = ()
    fp8: bool = False
    shared_workspace: bool = False
    batch_p2p_sync: bool = False
    collectives: Mapping[str, int] = field(default_factory=dict)
    nccl_max_ctas: int | None = None


def objections(environment: Environment) -> tuple[str, ...]:
    """Lists why lanes cannot be had, each in one line with what to do.

    Sequence parallelism is none: every module has gather buffers of its own here.
    """
    found = [
        *_connections(environment),
        *_launches(environment),
        *_precision(environment),
        *_workspace(environment),
        *_collectives(environment),
    ]
    return tuple(found)


def _connections(environment: Environment) -> list[str]:
    """One hardware queue runs kernels of all streams in the order of their launches.

    Source: CUDA C++ Programming Guide, "Environment Variables" and "Implicit Synchronization".
    """
    capability = environment.compute_capability
    if capability is None:
        return []
    names = ", ".join(environment.model_parallel)
    if names and capability < _BLACKWELL:
        major, minor = capability
        return [
            f"modules {names}: tensor_model_parallel_size and context_parallel_size must be 1 to "
            f"share a GPU of compute capability {major}.{minor}, below 10.0: Megatron forces "
            f"{CONNECTIONS}=1 there, which runs lanes one after the other; use data or pipeline "
            f"parallelism, or kind=colocated"
        ]
    if environment.device_max_connections == "1":
        return [
            f"environment: {CONNECTIONS}=1 must be > 1, as one hardware queue runs lanes one "
            f"after the other; unset it or use 8"
        ]
    return []


def _launches(environment: Environment) -> list[str]:
    found = []
    if environment.launch_blocking and environment.compute_capability is not None:
        found.append(
            "environment: CUDA_LAUNCH_BLOCKING=1 must be unset, as the launching thread waits "
            "for every kernel with it; unset it"
        )
    # Megatron-LM core 0.19, pipeline_parallel/p2p_communication.py: torch.cuda.synchronize().
    if environment.batch_p2p_sync:
        found.append(
            "config: batch_p2p_sync=True must be False, as it drains all lanes after every "
            "transfer; set batch_p2p_sync=False"
        )
    return found


def _precision(environment: Environment) -> list[str]:
    # TransformerEngine reduces the amax of all modules of a process in shared buffers.
    if not environment.fp8:
        return []
    return [
        "arguments: fp8 must be off where modules share a GPU, as TransformerEngine keeps their "
        "scales in buffers of the process; use bf16"
    ]


def shares_workspace(gemm: Any) -> bool:
    """Whether matrix products of a TransformerEngine that run at once write to the same memory.

    Up to 1.x, in ``module/base.py``, there is one workspace for the process. In 2.x, up to
    2.21.0.dev0 at least, ``get_cublas_workspace`` keeps one for each device, without regard to
    streams. A later one makes a workspace for each call, which the allocator keeps apart. torch's
    own products have one for each stream.

    Args:
        gemm: The module ``transformer_engine.pytorch.cpp_extensions.gemm``.
    """
    workspace = getattr(gemm, "get_cublas_workspace", None)
    return workspace is None or hasattr(workspace, "cache_info")


def _workspace(environment: Environment) -> list[str]:
    if not environment.shared_workspace:
        return []
    return [
        "arguments: transformer_impl=transformer_engine must be local where modules share a GPU, "
        "as its matrix products share one workspace; use --transformer-impl local"
    ]


def _collectives(environment: Environment) -> list[str]:
    # Every thread block of a collective waits for its peer on other ranks: one that finds no SM
    # while its neighbours hold all of the lane's can keep both waiting.
    ctas = environment.nccl_max_ctas or _NCCL_MAX_CTAS
    return [
        f"lane {lane}: share.sms={sms} must be >= NCCL_MAX_CTAS={ctas}, as a collective waits "
        f"until all its thread blocks run; set NCCL_MAX_CTAS={sms} or raise the quota"
        for lane, sms in environment.collectives.items()
        if environment.compute_capability is not None and sms < ctas
    ]
