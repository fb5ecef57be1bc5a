"""Fits how operations share a GPU to measured times, and says how far off the fit is."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import log
from statistics import fmean
from typing import NamedTuple, get_args

import numpy as np
from scipy.optimize import minimize_scalar

from megatron_mosaic.cluster.spec import SharingCurves
from megatron_mosaic.cost.spatial import Demand, rate_share, slowdowns
from megatron_mosaic.model.spec import Precision
from megatron_mosaic.profile.fit import fit_rate, rounded
from megatron_mosaic.profile.measurements import TimedOperation

_MOST_INTERFERENCE = 5.0
_LOG_LEAST_RATE = log(1e-3)  # one multiprocessor of a GPU larger than any
DENSITIES = (1, 2, 4)
"""Of how many measured numbers of multiprocessors one is known, where errors are told."""


class TimedPart(NamedTuple):
    """An operation on some multiprocessors, alone.

    Args:
        operation: What was timed, and its seconds.
        sms: Multiprocessors that it had.
    """

    operation: TimedOperation
    sms: int


class TimedPair(NamedTuple):
    """Two operations, each repeated in its lane: alone, and while the other is at work.

    Args:
        names: Of both, for people.
        sms: Multiprocessors of each.
        moved_bytes: What each reads and writes.
        alone_s: Time of each with its multiprocessors, and nothing beside it.
        beside_s: Ditto beside the other.
    """

    names: tuple[str, str]
    sms: tuple[int, int]
    moved_bytes: tuple[float, float]
    alone_s: tuple[float, float]
    beside_s: tuple[float, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class FittedSharing:
    """What follows from measurements of operations that share a GPU.

    Args:
        curves: As a GPU's file has them.
        rate_errors: Mean relative error of times on numbers of multiprocessors that were left out
            of the table, by how many of those measured one was kept; 1 leaves one out at a time.
        pair_error: Ditto of operations beside others, each pair left out of the fit in turn;
            None where fewer than two were measured.
    """

    curves: SharingCurves
    rate_errors: Mapping[int, float]
    pair_error: float | None


def fit_sharing(
    parts: Sequence[TimedPart],
    pairs: Sequence[TimedPair],
    *,
    num_sms: int,
    source: str,
) -> FittedSharing:
    """Fits rates by multiprocessors, the bandwidth's knee, and interference.

    Args:
        parts: Operations of every kind on the whole GPU and on parts of it, those that memory
            bounds among them.
        pairs: Operations beside others; none leaves interference at 0.
        num_sms: Multiprocessors of the GPU.
        source: Where the numbers are from.
    """
    rates = fit_rates(parts, num_sms=num_sms)
    knee = fit_knee(rates["elementwise"], num_sms=num_sms)
    curves = SharingCurves(bandwidth_knee=knee, interference=0.0, rates=rates, source=source)
    most = bytes_per_s(parts, num_sms=num_sms)
    known = [(pair, demands_of(pair, curves, num_sms=num_sms, most=most)) for pair in pairs]
    return FittedSharing(
        curves=SharingCurves(
            bandwidth_knee=knee,
            interference=fit_interference(known),
            rates=rates,
            source=source,
        ),
        rate_errors={every: density_error(parts, num_sms=num_sms, every=every)
                     for every in DENSITIES},
        pair_error=held_out_error(known) if len(known) > 1 else None,
    )  # fmt: skip


def fit_rates(parts: Iterable[TimedPart], *, num_sms: int) -> dict[str, dict[int, float]]:
    """Rates of every kind of operation over that on the whole GPU, by multiprocessors.

    What it costs to launch an operation is known from the sizes on the whole GPU, and is no more
    than of one that memory bounds. The rest of its time goes with the rate, which is the closest
    one for all sizes. Rates do not fall with more multiprocessors: where noise says so, the higher
    one holds.

    Args:
        parts: All kinds, ``elementwise`` among them, each on the whole GPU as well.
        num_sms: Multiprocessors of the GPU.
    """
    kinds = _by_kind(parts)
    launch_s = _fixed_s(kinds["elementwise"], num_sms)
    return {kind: _kind_rates(own, num_sms, launch_s) for kind, own in kinds.items()}


def _by_kind(parts: Iterable[TimedPart]) -> dict[str, list[TimedPart]]:
    kinds: dict[str, list[TimedPart]] = {}
    for part in parts:
        kinds.setdefault(kind_of(part.operation.curve), []).append(part)
    return dict(sorted(kinds.items()))


def kind_of(curve: str) -> str:
    """Kind of an operation whose rates are told: its curve without the precision."""
    name, _, last = curve.rpartition(".")
    return name if last in get_args(Precision) else curve


def _kind_rates(parts: Sequence[TimedPart], num_sms: int, launch_s: float) -> dict[int, float]:
    whole, fixed_s = _whole_s(parts, num_sms), min(launch_s, _fixed_s(parts, num_sms))
    counts = sorted({part.sms for part in parts})
    found = []
    for sms in counts:
        own = [it for it, count in parts if count == sms]
        scaled_s = np.array([max(whole[_identity(it)] - fixed_s, 0.0) for it in own])
        found.append(_rate(scaled_s, np.array([it.seconds for it in own]), fixed_s))
    rates = np.maximum.accumulate(found)
    rates[-1] = 1.0 if counts[-1] == num_sms else rates[-1]
    return {sms: rounded(float(rate)) for sms, rate in zip(counts, rates, strict=True)}


def _rate(scaled_s: np.ndarray, seconds: np.ndarray, fixed_s: float) -> float:
    """Rate that explains times best of which a part goes with it."""

    def distance(log_rate: float) -> float:
        return float((np.log((fixed_s + scaled_s / np.exp(log_rate)) / seconds) ** 2).sum())

    return float(np.exp(_smallest(distance, low=_LOG_LEAST_RATE, high=0.0)))


def _identity(operation: TimedOperation) -> tuple[str, float, float]:
    return operation.curve, operation.size, operation.smallest


def _whole_s(parts: Iterable[TimedPart], num_sms: int) -> dict[tuple[str, float, float], float]:
    return {_identity(it.operation): it.operation.seconds for it in parts if it.sms == num_sms}


def _fixed_s(parts: Sequence[TimedPart], num_sms: int) -> float:
    """Time that every operation of a kind takes, whatever its size."""
    fitted = fit_rate([part.operation for part in parts if part.sms == num_sms])
    return fitted.half_size / fitted.limit_per_s


def fit_knee(rates: Mapping[int, float], *, num_sms: int) -> float:
    """Share of the multiprocessors from which on what memory bounds is no faster."""
    parts = np.array([sms / num_sms for sms in rates])
    measured = np.array(list(rates.values()))

    def distance(knee: float) -> float:
        return float((np.log(np.minimum(1.0, parts / knee) / measured) ** 2).sum())

    return rounded(_smallest(distance, low=float(parts.min()), high=1.0))


def bytes_per_s(parts: Iterable[TimedPart], *, num_sms: int) -> float:
    """Rate of large operations that memory bounds, on the whole GPU."""
    moving = [it for it, sms in parts if sms == num_sms and it.curve == "elementwise"]
    return fit_rate(moving).limit_per_s


Known = tuple[TimedPair, tuple[Demand, Demand]]


def demands_of(
    pair: TimedPair, curves: SharingCurves, *, num_sms: int, most: float
) -> tuple[Demand, Demand]:
    """What both operations of a pair ask of memory, each alone on its multiprocessors.

    Args:
        pair: The pair.
        curves: How much of the bandwidth multiprocessors draw.
        num_sms: Multiprocessors of the GPU.
        most: Bytes per second that operations reach.
    """
    first, second = (
        _demand(
            moved / (alone_s * most),
            rate_share(curves, "elementwise", sms=sms, num_sms=num_sms),
        )
        for moved, alone_s, sms in zip(pair.moved_bytes, pair.alone_s, pair.sms, strict=True)
    )
    return first, second


def _demand(bandwidth: float, reached: float) -> Demand:
    # As the cost model sees one: it computes while it moves bytes, and takes the longer of both. So
    # with half the bandwidth it takes twice the time of its bytes, if that is more than its own.
    stall = 2 * bandwidth / reached - 1
    return Demand(bandwidth=min(1.0, bandwidth), stall=min(1.0, max(0.0, stall)))


def fit_interference(known: Sequence[Known]) -> float:
    """Interference with which predicted and measured slowdowns are closest; 0 of no pairs."""
    if not known:
        return 0.0

    def distance(interference: float) -> float:
        return fmean(
            float(np.log(guess / it) ** 2)
            for pair, demands in known
            for guess, it in zip(
                slowdowns(demands, (1.0, 1.0), interference=interference),
                _slowdowns(pair),
                strict=True,
            )
        )

    return rounded(_smallest(distance, low=0.0, high=_MOST_INTERFERENCE))


def _slowdowns(pair: TimedPair) -> list[float]:
    return [b / a for a, b in zip(pair.alone_s, pair.beside_s, strict=True)]


def held_out_error(known: Sequence[Known]) -> float:
    """Mean relative error of times beside others, of each pair from a fit to all other pairs.

    Args:
        known: At least two pairs, and what they ask of memory.
    """
    errors = []
    for place, (pair, demands) in enumerate(known):
        interference = fit_interference([*known[:place], *known[place + 1 :]])
        guesses = slowdowns(demands, (1.0, 1.0), interference=interference)
        errors += [abs(guess / it - 1) for guess, it in zip(guesses, _slowdowns(pair), strict=True)]
    return fmean(errors)


def density_error(parts: Sequence[TimedPart], *, num_sms: int, every: int) -> float:
    """Mean relative error of times on numbers of multiprocessors that a table lacks.

    Args:
        parts: All that was measured.
        num_sms: Multiprocessors of the GPU; the table always has it.
        every: Of how many numbers one is in the table, from the least on; with 1 all are but one,
            which is another one each time. 0 is returned if none is left out.
    """
    counts = sorted({part.sms for part in parts} - {num_sms})
    if every > 1:
        left_out = [[sms for place, sms in enumerate(counts) if place % every]]
    else:
        left_out = [[sms] for sms in counts]
    errors = [
        error for missing in left_out for error in _errors_without(parts, missing, num_sms=num_sms)
    ]
    return fmean(errors) if errors else 0.0


def _errors_without(
    parts: Sequence[TimedPart], missing: Sequence[int], *, num_sms: int
) -> list[float]:
    kept = [part for part in parts if part.sms not in missing]
    rates = fit_rates(kept, num_sms=num_sms)
    curves = SharingCurves(bandwidth_knee=1.0, interference=0.0, rates=rates)
    whole = _whole_s(parts, num_sms)
    fixed_s = {kind: _fixed_s(own, num_sms) for kind, own in _by_kind(kept).items()}
    launch_s = fixed_s["elementwise"]
    errors = []
    for operation, sms in parts:
        if sms in missing:
            own_s = min(launch_s, fixed_s[kind_of(operation.curve)])
            rate = rate_share(curves, operation.curve, sms=sms, num_sms=num_sms)
            guess_s = own_s + (whole[_identity(operation)] - own_s) / rate
            errors.append(abs(guess_s / operation.seconds - 1))
    return errors


def _smallest(distance: Callable[[float], float], *, low: float, high: float) -> float:
    """Place of the least value in an interval: of a grid, then between the neighbours of it."""
    grid = np.linspace(low, high, 17)
    values = [distance(float(it)) for it in grid]
    best = int(np.argmin(values))
    around = grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)]
    if around[0] == around[1]:
        return float(grid[best])
    found = minimize_scalar(distance, bounds=around, method="bounded")
    return float(found.x) if found.fun < values[best] else float(grid[best])
