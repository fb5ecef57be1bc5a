"""Seconds that operations take on a GPU, from its efficiency curves."""

from collections.abc import Iterable
from typing import NamedTuple

from megatron_mosaic.cluster.spec import Curve, Gpu
from megatron_mosaic.cost.operations import Operation
from megatron_mosaic.errors import PlanError

# Curves of what memory bounds: their sizes are bytes, not FLOPs.
MEMORY_CURVES = ("elementwise", "permute", "optimizer")

# Where a curve of a precision is not known, that of the next one stands in.
_NEXT = {"nvfp4": "mxfp8", "mxfp8": "fp8", "fp8": "bf16", "fp16": "bf16", "fp32": "bf16"}


# How much faster attention is in fp8, whose exponentials are not; taken alike for its backward.
# Source: Shah et al., arXiv 2407.08608: 1.2 PFLOP/s for 740 TFLOP/s in 2 bytes, forward.
FP8_ATTENTION = 1.6


class PassTimes(NamedTuple):
    """Seconds of operations in the passes of a step."""

    forward_s: float
    input_gradient_s: float
    weight_gradient_s: float
    core_s: float


class PassBytes(NamedTuple):
    """What operations read and write in the passes of a step."""

    forward: float = 0.0
    input_gradient: float = 0.0
    weight_gradient: float = 0.0
    core: float = 0.0


def find_curve(gpu: Gpu, name: str, precision: str) -> Curve:
    """Finds the curve of a kind of operation.

    Raises:
        PlanError: The GPU has none for it, nor for a precision that could stand in.
    """
    if (curve := gpu.curves.get(name)) is not None:
        return curve
    while True:
        if (curve := gpu.curves.get(f"{name}.{precision}")) is not None:
            return curve
        if precision not in _NEXT:
            raise PlanError(
                f"gpu {gpu.name}: curves={', '.join(sorted(gpu.curves))} must have one for "
                f"{name}; add it, or measure it with megatron-mosaic profile"
            )
        precision = _NEXT[precision]


def pass_times(gpu: Gpu, operations: Iterable[Operation], *, gradient_bytes: int) -> PassTimes:
    """Adds up what operations take in each pass.

    The gradient of weights reads and writes the accumulated gradient, besides its operands.
    """
    forward = inputs = weights = core = 0.0
    for it in operations:
        seconds = forward_s(gpu, it)
        forward += seconds
        core += seconds if it.core else 0.0
        inputs += input_gradient_s(gpu, it)
        if it.weights:
            weights += weight_gradient_s(gpu, it, gradient_bytes=gradient_bytes)
    return PassTimes(forward, inputs, weights, core)


def pass_bytes(operations: Iterable[Operation], *, gradient_bytes: int) -> PassBytes:
    """Adds up what operations read and write in each pass."""
    forward = inputs = weights = core = 0.0
    for it in operations:
        forward += it.forward_bytes
        core += it.forward_bytes if it.core else 0.0
        inputs += it.backward_bytes
        if it.weights:
            weights += _weight_gradient_bytes(it, gradient_bytes)
    return PassBytes(forward, inputs, weights, core)


def forward_s(gpu: Gpu, it: Operation) -> float:
    """Seconds of an operation's forward pass."""
    name = f"{it.curve}.forward" if it.curve.endswith("attention") else it.curve
    return _roof_s(gpu, name, it, it.flops, it.forward_bytes)


def input_gradient_s(gpu: Gpu, it: Operation) -> float:
    """Seconds of the gradient of an operation's input."""
    name = f"{it.curve}.backward" if it.curve.endswith("attention") else it.curve
    return _roof_s(gpu, name, it, it.backward_flops, it.backward_bytes)


def weight_gradient_s(gpu: Gpu, it: Operation, *, gradient_bytes: int) -> float:
    """Seconds of the gradient of an operation's weights, added to what is there."""
    moved = _weight_gradient_bytes(it, gradient_bytes)
    own = f"weight_gradient.{it.curve}"
    name = own if f"{own}.{it.precision}" in gpu.curves else it.curve
    return _roof_s(gpu, name, it, it.flops, moved)


def _weight_gradient_bytes(it: Operation, gradient_bytes: int) -> float:
    operands = it.forward_bytes - 2 * it.weights
    return operands + 2 * gradient_bytes * it.weights


def _roof_s(gpu: Gpu, name: str, it: Operation, flops: float, moved_bytes: float) -> float:
    mover = "permute" if it.curve == "permute" else "elementwise"
    seconds = memory_s(gpu, moved_bytes, curve=mover)
    if flops:
        curve = find_curve(gpu, name, it.precision)
        share = curve.share(flops, smallest=it.smallest)
        peak = gpu.peak_flops_per_s(it.precision)
        if it.precision == "fp8" and it.curve.endswith("attention"):
            peak = FP8_ATTENTION * gpu.peak_flops_per_s("bf16")
        seconds = max(seconds, flops / (peak * share))
    return seconds


def memory_s(gpu: Gpu, moved_bytes: float, *, curve: str = "elementwise") -> float:
    """Seconds in which memory reads and writes some bytes."""
    if moved_bytes <= 0:
        return 0.0
    share = find_curve(gpu, curve, "bf16").share(moved_bytes)
    return moved_bytes / (gpu.memory_bytes_per_s * share)
