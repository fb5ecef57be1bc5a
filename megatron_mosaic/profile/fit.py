"""Fits the cost model's few constants to measured times."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.optimize import nnls

from megatron_mosaic.profile.measurements import TimedMessage, TimedOperation


class FittedRate(NamedTuple):
    """Rate of an operation by its size: ``limit * size / (size + half_size)``.

    Args:
        limit_per_s: FLOPs or bytes per second of large operations.
        half_size: Size that reaches half of it.
        error: Mean relative distance between measured and fitted seconds.
    """

    limit_per_s: float
    half_size: float
    error: float


class FittedLink(NamedTuple):
    """Time of a message: ``steps * latency + bytes / bandwidth``.

    Args:
        latency_s: Of one step.
        bandwidth_bytes_per_s: Of one rank in one direction.
        error: Mean relative distance between measured and fitted seconds.
    """

    latency_s: float
    bandwidth_bytes_per_s: float
    error: float


def fit_rate(timed: Sequence[TimedOperation]) -> FittedRate:
    """Fits a curve to the times of one operation at several sizes.

    A rate ``limit * size / (size + half)`` is the time ``half / limit + size / limit``: a line
    over the size, whose two numbers are fitted to the relative error.

    Args:
        timed: At least one.
    """
    columns = [[1.0, it.size] for it in timed]
    (fixed_s, s_per_size), error = _fit(columns, [it.seconds for it in timed])
    return FittedRate(rounded(1 / s_per_size), rounded(fixed_s / s_per_size), error)


def fit_link(timed: Sequence[TimedMessage]) -> FittedLink:
    """Fits latency and bandwidth to the times of collectives of several sizes.

    Args:
        timed: At least one.
    """
    columns = [[it.steps, it.moved_bytes] for it in timed]
    (latency_s, s_per_byte), error = _fit(columns, [it.seconds for it in timed])
    return FittedLink(rounded(latency_s), rounded(1 / s_per_byte), error)


def link_error(link: FittedLink, timed: Sequence[TimedMessage]) -> float:
    """Mean relative distance between fitted and measured seconds of some messages."""
    errors = [
        (it.steps * link.latency_s + it.moved_bytes / link.bandwidth_bytes_per_s) / it.seconds - 1
        for it in timed
    ]
    return sum(map(abs, errors)) / len(errors)


def _fit(
    columns: Sequence[Sequence[float]], seconds: Sequence[float]
) -> tuple[tuple[float, float], float]:
    """Fits ``seconds`` as a sum of columns with weights >= 0, each row by its relative error."""
    relative = np.array(columns) / np.array(seconds)[:, None]
    # Columns differ by ten orders of magnitude: scaled, the solver's tolerances fit both.
    scale = relative.max(axis=0)
    weights = nnls(relative / scale, np.ones(len(seconds)))[0] / scale
    if not weights[1]:
        # Times that do not grow with the size: all of them are spent on it, as a bound.
        weights = np.array([0.0, float(np.median(1 / relative[:, 1]))])
    error = float(np.abs(relative @ weights - 1).mean())
    return (float(weights[0]), float(weights[1])), error


def rounded(number: float) -> float:
    """Keeps as many digits as a measurement has."""
    return float(f"{number:.4g}")
