"""Statistics of arms that take turns: intervals, the denominator, what is noise."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

RESAMPLES = 2000
LEVEL = 0.95


class Interval(NamedTuple):
    """An estimate and its confidence interval."""

    estimate: float
    low: float
    high: float

    def written(self) -> dict[str, float]:
        """As results have it."""
        return self._asdict()


def in_turns(names: Sequence[str], *, rounds: int) -> Iterator[tuple[int, str]]:
    """Yields rounds and arms, every second round backwards (ABBA).

    What drifts, a clock or the temperature, then favours no arm.
    """
    for turn in range(rounds):
        yield from ((turn, name) for name in (names if turn % 2 == 0 else names[::-1]))


def median_interval(times_s: Sequence[float], *, seed: int = 0) -> Interval:
    """Median with its bootstrap interval.

    Source:
        The percentile method: Efron and Tibshirani, 1993, An Introduction to the Bootstrap,
        section 13.3.
    """
    return _bootstrap([times_s], lambda rows: np.median(rows[0], axis=-1), seed=seed)


def gain_interval(base_s: Sequence[float], times_s: Sequence[float], *, seed: int = 0) -> Interval:
    """How many times shorter an arm's median step is than that of a base.

    Rounds are resampled together, as the two ran side by side in each.

    Args:
        base_s: Seconds of the base in each round.
        times_s: Seconds of the arm in the same rounds.
        seed: Of the resampling: equal samples give equal intervals.
    """
    return _bootstrap(
        [base_s, times_s],
        lambda rows: np.median(rows[0], axis=-1) / np.median(rows[1], axis=-1),
        seed=seed,
    )


def _bootstrap(
    samples: Sequence[Sequence[float]],
    statistic: Callable[[np.ndarray], np.ndarray],
    *,
    seed: int,
) -> Interval:
    rows = np.array(samples, dtype=float)
    num_rounds = rows.shape[1]
    drawn = np.random.default_rng(seed).integers(num_rounds, size=(RESAMPLES, num_rounds))
    low, high = np.quantile(statistic(rows[:, drawn]), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(statistic(rows)), float(low), float(high))


def fastest(medians_s: Mapping[str, float | None], names: Sequence[str]) -> str | None:
    """Arm with the shortest median among those that ran; the first of equal ones."""
    ran = [name for name in names if medians_s.get(name) is not None]
    return min(ran, key=lambda name: medians_s[name] or 0.0, default=None)


def noise(control: Interval) -> float:
    """Largest difference from 1 that the same arm under two names still explains."""
    return max(abs(control.low - 1), abs(control.high - 1))


def recovered_share(
    *, serial_s: float, overlapped_s: float, gap_s: float, encoder_s: float
) -> float:
    """Part of what a gap can hide that was hidden: at most the gap, or all of the encoder."""
    return (serial_s - overlapped_s) / min(gap_s, encoder_s)


def bound_s(
    *,
    flops: float,
    num_bytes: float,
    flops_per_s: float,
    bytes_per_s: float,
    alone_s: Sequence[float],
) -> float:
    """Least time of work that several modules share.

    No unit does its work faster than it can, and no module ends before it would alone.
    """
    return max(flops / flops_per_s, num_bytes / bytes_per_s, *alone_s)


def arm_row(times_s: Sequence[float], *, base_s: Sequence[float] | None) -> dict[str, Any]:
    """What results say of an arm that ran."""
    gain = None if base_s is None else gain_interval(base_s, times_s).written()
    return {
        "median_s": median_interval(times_s).estimate,
        "median_interval_s": list(median_interval(times_s)[1:]),
        "gain": gain,
        "times_s": list(times_s),
    }
