"""Distributions as model files write them: a number, percentiles, or a histogram."""

import csv
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from megatron_mosaic.errors import PlanError
from megatron_mosaic.fields import mapping, number, read_keys, read_text, show, text
from megatron_mosaic.model.tokens import Distribution

# Shares that people round, such as three times 33.3 %, may miss their sum by this much.
_ROUNDING = 0.005


def read_distribution(field: str, value: object, *, folder: Path) -> Distribution:
    """Reads how a number differs from sample to sample.

    Args:
        field: Name of the value in messages.
        value: A number, or a mapping with one of ``mean`` (all values are the mean),
            ``percentiles`` (percent: value), ``histogram`` (value: share, or a CSV file with a
            column ``value`` and one of ``share``, ``percent``, ``count``) or ``counts``.
        folder: What the name of a CSV file is relative to.

    Raises:
        PlanError: It is none of these, or shares add up neither to 1 nor to 100.
    """
    if not isinstance(value, dict):
        return Distribution.constant(number(field, value))
    if len(value) != 1:
        raise PlanError(
            f"{field}={show(value)} must have one key; write mean, percentiles, histogram or counts"
        )
    known = {"mean": number, "percentiles": _pairs, "histogram": _histogram, "counts": _pairs}
    ((kind, content),) = read_keys(f"{field}: ", value, known=known, required=()).items()
    where = f"{field}.{kind}"
    if kind == "mean":
        return Distribution.constant(content)
    if kind == "percentiles":
        return _of_percentiles(where, content)
    if isinstance(content, str):
        return _of_file(where, folder / content)
    return _of_shares(where, content, whole=None if kind == "counts" else (1, 100))


def write_distribution(distribution: Distribution) -> Any:
    """Writes a distribution as ``read_distribution`` reads it."""
    if len(distribution.values) == 1:
        return _short(distribution.values[0])
    pairs = zip(distribution.values, distribution.shares, strict=True)
    return {"histogram": {_short(value): share for value, share in pairs}}


def _short(value: float) -> float:
    return int(value) if value == int(value) else value


def _pairs(field: str, value: object) -> dict[float, float]:
    if not mapping(field, value):
        raise PlanError(f"{field}={show(value)} must have an entry; write {{256: 0.5, 1024: 0.5}}")
    return {
        number(f"{field} key", key): number(f"{field}[{key}]", entry)
        for key, entry in mapping(field, value).items()
    }


def _histogram(field: str, value: object) -> dict[float, float] | str:
    return text(field, value) if isinstance(value, str) else _pairs(field, value)


def _of_shares(
    where: str, shares: Mapping[float, float], *, whole: tuple[int, ...] | None
) -> Distribution:
    total = sum(shares.values())
    if whole and not any(abs(total - one) <= one * _ROUNDING for one in whole):
        wanted = " or ".join(map(str, whole))
        raise PlanError(
            f"{where}={show(dict(shares))} must add up to {wanted}, but its sum is {total:g}; "
            f"mend the shares, or write counts"
        )
    if total <= 0:
        raise PlanError(f"{where}={show(dict(shares))} must have an entry > 0; remove the key")
    present = {value: share for value, share in shares.items() if share > 0}
    return Distribution.of_weights(list(present), list(present.values()))


def _of_percentiles(where: str, values: Mapping[float, float]) -> Distribution:
    """Takes values between two percentiles as spread evenly, those outside as the nearest one.

    Ends and middle of an interval with weights 1:4:1 have its mean and mean square exactly.
    """
    points = sorted(values.items())
    if points[-1][0] > 100:
        raise PlanError(f"{where}={show(dict(values))} must be percents <= 100; write {{50: 256}}")
    if [value for _, value in points] != sorted(value for _, value in points):
        raise PlanError(f"{where}={show(dict(values))} must not fall; sort values with percents")
    points = [(0.0, points[0][1]), *points, (100.0, points[-1][1])]
    weights: dict[float, float] = {}
    for (low, first), (high, last) in pairwise(points):
        for value, part in ((first, 1), ((first + last) / 2, 4), (last, 1)):
            weights[value] = weights.get(value, 0.0) + (high - low) * part / 6
    present = {value: weight for value, weight in weights.items() if weight > 0}
    return Distribution.of_weights(list(present), list(present.values()))


def _of_file(where: str, path: Path) -> Distribution:
    rows = list(csv.DictReader(read_text(path).splitlines()))
    columns = list(rows[0]) if rows else []
    wholes = {"share": (1,), "percent": (100,), "count": None}
    if len(columns) != 2 or columns[0] != "value" or columns[1] not in wholes:
        raise PlanError(
            f"{where}={show(str(path))} must have the columns value and one of share, percent, "
            f"count; begin the file with the line 'value,share'"
        )
    shares: dict[float, float] = {}
    for line, row in enumerate(rows, start=2):
        value = number(f"{path} line {line}: value", row["value"])
        shares[value] = number(f"{path} line {line}: {columns[1]}", row[columns[1]])
    return _of_shares(f"{where}={path}: {columns[1]}", shares, whole=wholes[columns[1]])
