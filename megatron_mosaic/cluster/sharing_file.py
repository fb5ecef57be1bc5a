"""The ``sharing`` block of a GPU: from YAML and back."""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from megatron_mosaic.cluster.spec import Gpu, SharingCurves
from megatron_mosaic.errors import LayoutError, PlanError
from megatron_mosaic.fields import Parse, mapping, number, read_keys, show, text


def read_sharing(field: str, value: object) -> SharingCurves:
    """Reads the block.

    Raises:
        PlanError: A key is unknown, missing or mistyped.
        LayoutError: Rates fall with more multiprocessors.
    """
    known: Mapping[str, Parse] = {
        "bandwidth_knee": _share,
        "interference": number,
        "rates": _rates,
        "source": text,
    }
    required = ("bandwidth_knee", "interference", "source")
    return SharingCurves(
        **read_keys(f"{field}: ", mapping(field, value), known=known, required=required)
    )


def check_sms(field: str, gpu: Gpu) -> None:
    """Checks that rates are of multiprocessors that the GPU has.

    Raises:
        LayoutError: Some are of more.
    """
    for kind, rates in (gpu.sharing.rates if gpu.sharing else {}).items():
        if (most := max(rates)) > gpu.num_sms:
            raise LayoutError(
                f"{field}: sharing: rates.{kind}: sms={most} must be <= num_sms={gpu.num_sms}; "
                f"remove it, or measure on this GPU"
            )


def written_sharing(sharing: SharingCurves) -> dict[str, Any]:
    """The block as a file has it."""
    rates = {kind: dict(its) for kind, its in sharing.rates.items()}
    return {
        "bandwidth_knee": sharing.bandwidth_knee,
        "interference": sharing.interference,
        **({"rates": rates} if rates else {}),
        "source": sharing.source,
    }


def _rates(field: str, value: object) -> Mapping[str, Mapping[int, float]]:
    return {
        text(f"{field} key", kind): _kind_rates(f"{field}.{kind}", rates)
        for kind, rates in mapping(field, value).items()
    }


def _kind_rates(field: str, value: object) -> Mapping[int, float]:
    rates = {_sms(field, sms): _share(f"{field}.{sms}", it) for sms, it in _listed(field, value)}
    rates = dict(sorted(rates.items()))
    for (fewer, low), (more, high) in pairwise(rates.items()):
        if high < low:
            raise LayoutError(
                f"{field}: rate={high} of {more} multiprocessors must be >= rate={low} of {fewer}; "
                f"measure again, or write what the smaller number reaches"
            )
    return rates


def _listed(field: str, value: object) -> list[tuple[object, object]]:
    if not isinstance(value, dict) or not value:
        raise PlanError(
            f"{field}={show(value)} must be rates by multiprocessors; write one such as 66: 0.5"
        )
    return list(value.items())


def _sms(field: str, value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise PlanError(
            f"{field}: sms={show(value)} must be a whole number >= 1; write one such as 66"
        )
    return value


def _share(field: str, value: object) -> float:
    if not 0 < number(field, value) <= 1:
        raise PlanError(f"{field}={show(value)} must be > 0 and <= 1; write one such as 0.5")
    return number(field, value)
