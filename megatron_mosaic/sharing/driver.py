"""Streams that run on some SMs of a GPU only, by the CUDA driver: one split, one context each.

Source: CUDA driver API, "Green Contexts",
https://docs.nvidia.com/cuda/cuda-driver-api/group__CUDA__GREEN__CONTEXTS.html
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any, NamedTuple

from megatron_mosaic.cluster.sm_partition import Granularity, SmSplit, split_for
from megatron_mosaic.errors import HostError
from megatron_mosaic.sharing.lane import Quota
from megatron_mosaic.sharing.streams import priorities

# The first driver with streams of green contexts, as cuDriverGetVersion counts: CUDA 12.5.
_OLDEST_DRIVER = 12050

_FALL_BACK = "use --mosaic-sharing priority"

# What a driver's refusals mean here, by their number in CUresult.
_REMEDIES = {
    2: "leave memory free on the device, or " + _FALL_BACK,
    801: "this device or its mode has no green contexts; " + _FALL_BACK,
    914: "this device has no SMs to split; " + _FALL_BACK,
    915: "choose quotas of which the driver can make groups, or " + _FALL_BACK,
}


class QuotaError(HostError):
    """The device or its driver cannot give lanes their SM quotas.

    Args:
        message: One line.
        code: Number of the driver's error, if it returned one.
    """

    def __init__(self, message: str, *, code: int | None = None) -> None:
        super().__init__(message)
        self.code = code


class GreenStream(NamedTuple):
    """A stream of a green context.

    Args:
        handle: Of the stream, as torch takes it.
        sms: What the context has, as the device says.
        owners: What must live as long as the stream is used.
    """

    handle: int
    sms: int
    owners: tuple[Any, ...]


def load_driver() -> Any:
    """Returns the module that calls the CUDA driver.

    Raises:
        QuotaError: It is not installed, finds no driver, or the driver is too old.
    """
    try:
        driver: Any = import_module("cuda.bindings.driver")
    except ImportError as error:
        raise QuotaError(
            f"package cuda-bindings must be installed for SM quotas ({error}); install it or "
            f"{_FALL_BACK}"
        ) from error
    check_version(driver)
    return driver


def check_version(driver: Any) -> int:
    """Returns the version of the driver, such as 13000 for CUDA 13.0.

    Raises:
        QuotaError: There is none, or it has no streams of green contexts.
    """
    version = DriverCalls(driver, where="driver")("cuDriverGetVersion")
    if version < _OLDEST_DRIVER:
        raise QuotaError(
            f"driver: CUDA {version // 1000}.{version % 1000 // 10} must be >= 12.5 for SM "
            f"quotas; update the driver or {_FALL_BACK}"
        )
    return version


@dataclass(frozen=True, kw_only=True, slots=True)
class _Device:
    """A GPU as its driver sees it."""

    handle: Any
    everything: Any
    sizes: Granularity


def green_streams(
    quotas: Sequence[Quota], *, device: int, sizes: Granularity, driver: Any
) -> list[GreenStream | None]:
    """Splits the SMs of a GPU once and makes a stream for each lane with a quota.

    Args:
        quotas: Of all lanes; None stands for one that uses the whole GPU.
        device: Number of the GPU.
        sizes: Of groups, where the driver does not say.
        driver: The module ``cuda.bindings.driver``.

    Returns:
        One stream a lane, None without a quota. Nothing destroys them: the allocator and
        autograd keep using a stream as long as the process lives.

    Raises:
        QuotaError: The driver refuses, or gives other SMs than were asked for. What was made
            until then is destroyed.
        LayoutError: The GPU can give no such quotas.
    """
    asked = " | ".join("-" if quota.sms is None else str(quota.sms) for quota in quotas)
    calls = DriverCalls(driver, where=f"cuda:{device}: share.sms={asked}")
    gpu = _device(calls, device, sizes)
    split = split_for(
        [quota.sms for quota in quotas],
        num_sms=gpu.everything.sm.smCount,
        sizes=gpu.sizes,
        where=f"cuda:{device}",
    )
    ranked = [
        replace(quota, priority=priority)
        for quota, priority in zip(quotas, priorities(quotas), strict=True)
    ]
    with ExitStack() as undo:
        places = _places(calls, gpu, split) if split.num_groups else []
        streams = [
            _stream(calls, gpu, quota, [places[part] for part in parts], undo) if parts else None
            for quota, parts in zip(ranked, split.parts, strict=True)
        ]
        undo.pop_all()
    return streams


def _device(calls: "DriverCalls", device: int, sizes: Granularity) -> _Device:
    calls("cuInit", 0)
    handle = calls("cuDeviceGet", device)
    everything = calls("cuDeviceGetDevResource", handle, calls.sm_type)
    # Drivers before CUDA 13 leave these out.
    least = getattr(everything.sm, "minSmPartitionSize", 0) or sizes.least
    multiple = getattr(everything.sm, "smCoscheduledAlignment", 0) or sizes.multiple
    return _Device(handle=handle, everything=everything, sizes=Granularity(least, multiple))


def _places(calls: "DriverCalls", gpu: _Device, split: SmSplit) -> list[Any]:
    """Splits the SMs once: two splits would give the same ones twice."""
    groups, num_groups, rest = calls(
        "cuDevSmResourceSplitByCount", split.num_groups, gpu.everything, 0, split.group_sms
    )
    got = [group.sm.smCount for group in groups[:num_groups]]
    if got != [split.group_sms] * split.num_groups:
        raise QuotaError(
            f"{calls.where} must be {split.num_groups} groups of {split.group_sms} SMs, but the "
            f"driver can give {' | '.join(map(str, got))} and {rest.sm.smCount} over; choose "
            f"among these or {_FALL_BACK}"
        )
    return [*groups[:num_groups], rest]


def _stream(
    calls: "DriverCalls", gpu: _Device, quota: Quota, parts: Sequence[Any], undo: ExitStack
) -> GreenStream:
    enums = calls.driver
    descriptor = calls("cuDevResourceGenerateDesc", list(parts), len(parts))
    flag = enums.CUgreenCtxCreate_flags.CU_GREEN_CTX_DEFAULT_STREAM
    context = calls("cuGreenCtxCreate", descriptor, gpu.handle, flag)
    undo.callback(calls.quietly, "cuGreenCtxDestroy", context)
    flag = enums.CUstream_flags.CU_STREAM_NON_BLOCKING
    stream = calls("cuGreenCtxStreamCreate", context, flag, quota.priority)
    undo.callback(calls.quietly, "cuStreamDestroy", stream)
    check_sms(
        calls("cuGreenCtxGetDevResource", context, calls.sm_type).sm.smCount, quota, calls.where
    )
    owner = calls("cuStreamGetGreenCtx", stream)
    if int(owner) != int(context):
        raise QuotaError(
            f"{calls.where} must hold for the stream of lane {quota.lane}, but the driver made "
            f"it outside its context; update the driver or {_FALL_BACK}"
        )
    return GreenStream(handle=int(stream), sms=quota.sms or 0, owners=(context, stream))


def check_sms(got: int, quota: Quota, where: str) -> None:
    """Compares the SMs that a lane has with its quota.

    Raises:
        QuotaError: They differ.
    """
    if got != quota.sms:
        raise QuotaError(
            f"{where} must give lane {quota.lane} {quota.sms} SMs, but the device gave it {got}; "
            f"use {got} or {_FALL_BACK}"
        )


class DriverCalls:
    """Calls functions of a driver, whose errors become exceptions.

    Args:
        driver: The module ``cuda.bindings.driver``.
        where: What is asked for, for messages.
    """

    def __init__(self, driver: Any, *, where: str) -> None:
        self.driver = driver
        self.where = where

    @property
    def sm_type(self) -> Any:
        """The type of resource that SMs are."""
        return self.driver.CUdevResourceType.CU_DEV_RESOURCE_TYPE_SM

    def __call__(self, name: str, *arguments: Any) -> Any:
        """Calls a function; returns what it returns beside its error, one value or several.

        Raises:
            QuotaError: It returns an error, or the bindings or the driver do not have it.
        """
        function: Callable[..., Any] | None = getattr(self.driver, name, None)
        if function is None:
            raise QuotaError(
                f"{self.where} must find {name} in cuda-bindings; update the package or "
                f"{_FALL_BACK}"
            )
        try:
            error, *values = function(*arguments)
        except RuntimeError as missing:  # no driver on this machine, or one without the function
            raise QuotaError(
                f"{self.where} must find {name} in the CUDA driver ({_one_line(missing)}); "
                f"update the driver or {_FALL_BACK}"
            ) from missing
        if int(error):
            remedy = _REMEDIES.get(int(error), _FALL_BACK)
            raise QuotaError(
                f"{self.where} must be granted by the driver, but {name} returned "
                f"{error.name} ({int(error)}); {remedy}",
                code=int(error),
            )
        return values[0] if len(values) == 1 else tuple(values)

    def quietly(self, name: str, *arguments: Any) -> None:
        """Calls a function that cleans up after another error, which is the one to report."""
        getattr(self.driver, name)(*arguments)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
