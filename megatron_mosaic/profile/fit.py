"""Fits the cost model's few constants to measured times."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from scipy.optimize import least_squares

from megatron_mosaic.profile.measurements import TimedMessage, TimedOperation

_NOISE = 0.1  # of a time, relative: what repeats of one measurement differ by on a busy machine
_EXACT = 1e-12  # of the solver
_NOTHING = 1e-4  # of the smallest operation: no cost of its own
# A limit beyond what was measured is believed up to this factor: sizes that do not show it cannot
# tell it from none.
_BEYOND = 2.0


class FittedRate(NamedTuple):
    """Rate of an operation: ``limit * size / (size + half_size) * dim / (dim + half_dim)``.

    Args:
        limit_per_s: FLOPs or bytes per second of large operations.
        half_size: Size that reaches half of it.
        half_dim: Smallest size of a multiplication that reaches half of it.
        error: Mean relative distance between measured and fitted seconds.
    """

    limit_per_s: float
    half_size: float
    half_dim: float
    error: float

    def seconds(self, it: TimedOperation) -> float:
        """Time of an operation as fitted."""
        narrow = 1 + self.half_dim / it.smallest if it.smallest else 1.0
        return (it.size + self.half_size) / self.limit_per_s * narrow


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

    def seconds(self, it: TimedMessage) -> float:
        """Time of a message as fitted."""
        return it.steps * self.latency_s + it.moved_bytes / self.bandwidth_bytes_per_s


def fit_rate(timed: Sequence[TimedOperation]) -> FittedRate:
    """Fits a curve to the times of one operation at several sizes.

    The rate means the time ``(size + half_size) / limit * (1 + half_dim / dim)``. Where all
    multiplications are of one shape, or none is timed, ``half_dim`` cannot be told and is 0.

    Args:
        timed: At least one.
    """
    sizes, smallest, seconds = _columns([[it.size, it.smallest, it.seconds] for it in timed])
    limit = float((sizes / seconds).max())
    if _is_narrow(timed):
        scales = [1 / limit, float(sizes.min()), float(smallest.min())]
        s_per_size, half_size, half_dim = _fit(
            lambda found: found[0] * (sizes + found[1]) * (1 + found[2] / smallest),
            seconds,
            scales,
            limit=0,
        )
    else:
        scales, half_dim = [1 / limit, float(sizes.min())], 0.0
        s_per_size, half_size = _fit(
            lambda found: found[0] * (sizes + found[1]), seconds, scales, limit=0
        )
    fitted = FittedRate(rounded(1 / s_per_size), rounded(half_size), rounded(half_dim), 0.0)
    return fitted._replace(error=_mean_error([fitted.seconds(it) for it in timed], seconds))


def fit_link(timed: Sequence[TimedMessage]) -> FittedLink:
    """Fits latency and bandwidth to the times of collectives of several sizes.

    Args:
        timed: At least one.
    """
    steps, moved, seconds = _columns([[it.steps, it.moved_bytes, it.seconds] for it in timed])
    scales = [float((seconds / steps).min()), float((seconds / moved).min())]
    latency_s, s_per_byte = _fit(
        lambda found: found[0] * steps + found[1] * moved, seconds, scales, limit=1
    )
    fitted = FittedLink(rounded(latency_s), rounded(1 / s_per_byte), 0.0)
    return fitted._replace(error=link_error(fitted, timed))


def link_error(link: FittedLink, timed: Sequence[TimedMessage]) -> float:
    """Mean relative distance between fitted and measured seconds of some messages."""
    seconds = np.array([it.seconds for it in timed])
    return _mean_error([link.seconds(it) for it in timed], seconds)


def rounded(number: float) -> float:
    """Keeps as many digits as a measurement has."""
    return float(f"{number:.4g}")


def _is_narrow(timed: Sequence[TimedOperation]) -> bool:
    """Whether multiplications are of unlike shapes, which tells their size from a side's."""
    return len({round(it.smallest**3 / it.size, 9) for it in timed}) > 1


def _columns(rows: Sequence[Sequence[float]]) -> np.ndarray:
    return np.array(rows, dtype=float).T


def _fit(
    seconds_of: Callable[[np.ndarray], np.ndarray],
    seconds: np.ndarray,
    scales: Sequence[float],
    *,
    limit: int,
) -> list[float]:
    """Fits constants >= 0 to times, by the ratio of each to what is measured.

    What lies far off counts less (soft L1 beyond ``_NOISE``): now and then others use the machine.

    Args:
        seconds_of: Times that some constants mean.
        seconds: Measured ones.
        scales: Sizes that the constants may have.
        limit: Which constant is the time for a FLOP or byte; its scale is the least measured.
    """
    least = np.zeros(len(scales))
    least[limit] = 1 / _BEYOND
    found = least_squares(
        lambda constants: np.log(seconds_of(constants * scales) / seconds),
        np.ones(len(scales)),
        bounds=(least, np.inf),
        loss="soft_l1",
        f_scale=_NOISE,
        ftol=_EXACT,
        xtol=_EXACT,
        gtol=_EXACT,
    )
    constants = np.where(found.x < _NOTHING, 0, found.x) * scales
    return [float(constant) for constant in constants]


def _mean_error(fitted_s: Sequence[float], seconds: np.ndarray) -> float:
    return float(np.abs(np.array(fitted_s) / seconds - 1).mean())
