"""Where a part runs, how often, and how long it may take."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from megatron_mosaic.cluster.sm_partition import partitions, quotas

TINY_SMS = 32
"""SMs that a dry run pretends to have: enough for three ways to split them in two."""

HOPPER = (9, 0)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What all parts share.

    Args:
        device: Where.
        dtype: Of weights and activations.
        rounds: Turns of every arm.
        warm_up: Turns before them.
        budget_s: Seconds after which a part begins nothing new.
        seed: Of weights and batches.
    """

    device: torch.device
    dtype: torch.dtype
    rounds: int
    warm_up: int
    budget_s: float
    seed: int = 0

    @property
    def tiny(self) -> bool:
        """Whether it only shows that everything runs: on a host, with tensors of tiny sizes."""
        return self.device.type != "cuda"

    @property
    def num_sms(self) -> int:
        """SMs of the GPU."""
        if self.tiny:
            return TINY_SMS
        return torch.cuda.get_device_properties(self.device).multi_processor_count

    @property
    def compute_capability(self) -> tuple[int, int]:
        """Of the GPU."""
        return HOPPER if self.tiny else torch.cuda.get_device_capability(self.device)

    def splits(self, num_lanes: int) -> list[tuple[int, ...]]:
        """All ways to split the GPU among lanes."""
        capability = self.compute_capability
        return list(partitions(self.num_sms, compute_capability=capability, num_lanes=num_lanes))

    def quotas(self) -> tuple[int, ...]:
        """All quotas of one lane."""
        return quotas(self.num_sms, compute_capability=self.compute_capability)


def setting_on(device: str, *, budget_s: float, rounds: int | None = None) -> Setting:
    """The setting of a GPU, or of a dry run on the host."""
    if device == "cpu":
        return Setting(
            device=torch.device("cpu"),
            dtype=torch.float32,
            rounds=rounds or 2,
            warm_up=1,
            budget_s=budget_s,
        )
    return Setting(
        device=torch.device(device),
        dtype=torch.bfloat16,
        rounds=rounds or 12,
        warm_up=2,
        budget_s=budget_s,
    )


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Time of a part, from when it is made."""

    seconds: float
    began_s: float = field(default_factory=time.monotonic)

    @property
    def left_s(self) -> float:
        """Seconds that are left."""
        return self.seconds - (time.monotonic() - self.began_s)

    @property
    def spent(self) -> bool:
        """Whether nothing new should begin."""
        return self.left_s <= 0

    def told(self) -> str:
        """Why something was skipped."""
        return f"too little was left of {self.seconds:.0f} s"


def synchronize(device: torch.device) -> None:
    """Waits for all that was launched."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed_s(run: Callable[[], Any], device: torch.device) -> float:
    """Seconds of what is launched, from an idle device, by the device's own clock if it has one.

    The caller's stream must wait for all others that are used.
    """
    synchronize(device)
    if device.type != "cuda":
        began_s = time.perf_counter()
        run()
        return time.perf_counter() - began_s
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def median_s(run: Callable[[], Any], device: torch.device, *, repeats: int, warm_up: int) -> float:
    """Median seconds of some repetitions."""
    for _ in range(warm_up):
        run()
    times_s = sorted(timed_s(run, device) for _ in range(repeats))
    return times_s[len(times_s) // 2]
