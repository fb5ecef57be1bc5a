"""Clock and power of a GPU, where its library can be asked."""

import importlib
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

import torch


class Sensors:
    """Reads one GPU. Without NVML there is nothing to read, and results say so."""

    def __init__(self, device: torch.device) -> None:
        self._nvml: Any = None
        self._handle: Any = None
        if device.type != "cuda":
            self.note: str | None = "a host has no NVML"
            return
        try:
            self._nvml = importlib.import_module("pynvml")
        except ImportError as error:
            self.note = str(error)
            return
        try:
            self._nvml.nvmlInit()
            uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
            self._handle = self._nvml.nvmlDeviceGetHandleByUUID(uuid)
            self.note = None
        except self._nvml.NVMLError as error:
            self.note = f"NVML: {error}"

    def read(self) -> Mapping[str, float] | None:
        """Clock of the SMs in MHz and power in watts, now."""
        if self._handle is None:
            return None
        nvml = self._nvml
        return {
            "sm_clock_mhz": float(nvml.nvmlDeviceGetClockInfo(self._handle, nvml.NVML_CLOCK_SM)),
            "power_w": nvml.nvmlDeviceGetPowerUsage(self._handle) / 1e3,
        }

    def describe(self) -> Mapping[str, Any]:
        """Driver and limits, which results carry beside the machine's description."""
        if self._handle is None:
            return {"nvml": self.note}
        nvml, handle = self._nvml, self._handle
        return {
            "driver": str(nvml.nvmlSystemGetDriverVersion()),
            "power_limit_w": nvml.nvmlDeviceGetEnforcedPowerLimit(handle) / 1e3,
            "largest_sm_clock_mhz": nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_SM),
        }


def medians(readings: Sequence[Mapping[str, float] | None]) -> dict[str, float] | None:
    """Median of every reading."""
    found = [each for each in readings if each is not None]
    return {key: median(each[key] for each in found) for key in found[0]} if found else None
