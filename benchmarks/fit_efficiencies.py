"""Fits efficiency constants to one half of the published times, and writes them to the GPU files.

``python -m benchmarks.fit_efficiencies [--write]``
"""

import argparse
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.resources import files
from math import exp, log
from pathlib import Path

from scipy.optimize import least_squares

from benchmarks.halves import fitted_cases, halves
from benchmarks.predictions import SIMUMAX_MACHINE, cluster_of, predict
from benchmarks.published_points import Case, read_points
from megatron_mosaic.cluster.spec import Cluster, Gpu

BLACKWELL = ("b200", "gb200", "b300", "gb300")
HOPPER = ("h100", "h200")
RECENT = (*BLACKWELL, *HOPPER, "b200_simumax")
_FILES = {
    "A100": "a100-80g",
    "H100": "h100",
    "H200": "h200",
    "B200": "b200",
    "B300": "b300",
    "GB200": "gb200",
    "GB300": "gb300",
}
_PLAIN = ("host_operation_s", "overlap_cost")


@dataclass(frozen=True, kw_only=True, slots=True)
class Knob:
    """A constant that the fit may turn, for one GPU or for several of one generation.

    Args:
        gpus: Files of the GPUs that share it.
        curve: The curve, ``host_operation_s``, ``overlap_cost``, or
            ``host_expert_s.<precision>``.
        start: Where it starts: what operators alone, or another GPU of the generation, suggest.
        low: Least value.
        high: Greatest value.
        spread: Ratio to its start that counts as one standard deviation.
    """

    gpus: tuple[str, ...]
    curve: str
    start: float
    low: float
    high: float
    spread: float = 1.2


def knobs() -> tuple[Knob, ...]:
    """All constants of the fit, with what is known of them before."""
    # What the host does, and how much a collective disturbs, depends on the software.
    software = (
        Knob(gpus=RECENT, curve="host_operation_s", start=4e-4, low=1e-5, high=2e-3, spread=1.3),
        Knob(gpus=RECENT, curve="host_expert_s.bf16", start=2e-5, low=1e-6, high=1e-3, spread=2),
        Knob(gpus=RECENT, curve="host_expert_s.fp8", start=6e-5, low=1e-6, high=1e-3, spread=2),
        Knob(gpus=RECENT, curve="overlap_cost", start=0.15, low=0.02, high=0.6, spread=1.5),
    )
    scans = Knob(
        gpus=(*BLACKWELL, *HOPPER),
        curve="recurrence.bf16",
        start=0.05,
        low=0.005,
        high=0.6,
        spread=2,
    )
    return (*software, scans, *_simumax(), *_blackwell(), *_hopper(), *_ampere())


# Shares of large sizes among the operators that SimuMax measured on its B200,
# configs/system/b200_bf16_ceperm.json (4dcaae5) of its repository; attention for heads of 128, by
# the pairs that a causal mask leaves, and half again for what a small head costs.
_MEASURED = {
    "matmul.bf16": 0.485,
    "weight_gradient.matmul.bf16": 0.455,
    "grouped_matmul.bf16": 0.55,
    "weight_gradient.grouped_matmul.bf16": 0.47,
    "attention.forward": 0.86,
    "attention.backward": 0.66,
    "latent_attention.forward": 0.42,
    "latent_attention.backward": 0.32,
    "elementwise": 0.65,
    "permute": 0.5,
}


def _simumax() -> tuple[Knob, ...]:
    return tuple(
        Knob(gpus=("b200_simumax",), curve=curve, start=start, low=start / 2, high=1.0, spread=1.1)
        for curve, start in _MEASURED.items()
    )


def _blackwell() -> Iterator[Knob]:
    for curve in ("elementwise", "permute"):
        start = _MEASURED[curve]
        yield Knob(gpus=BLACKWELL, curve=curve, start=start, low=0.2, high=0.95, spread=1.1)
    # Blackwell Ultra computes exponentials twice as fast, which attention waits for.
    for gpus in (("b200", "gb200"), ("b300", "gb300")):
        for curve in _MEASURED:
            if "attention" in curve:
                start = _MEASURED[curve]
                yield Knob(gpus=gpus, curve=curve, start=start, low=start / 2, high=1.0)
    # Twice the bytes are no harder to move by value than one: at least fp8's share of the peak.
    for gpus in (("b200", "b300"), ("gb200", "gb300")):
        yield Knob(gpus=gpus, curve="matmul.bf16", start=0.65, low=0.3, high=0.9, spread=1.1)
    for gpus in (("b200", "b300"), ("gb200",), ("gb300",)):
        yield Knob(gpus=gpus, curve="matmul.fp8", start=0.65, low=0.3, high=0.95, spread=1.3)
        yield Knob(gpus=gpus, curve="matmul.mxfp8", start=0.6, low=0.3, high=0.95, spread=1.3)
    for curve, start, spread in (
        ("grouped_matmul.bf16", _MEASURED["grouped_matmul.bf16"], 1.1),
        ("grouped_matmul.fp8", 0.45, 1.5),
    ):
        yield Knob(gpus=BLACKWELL, curve=curve, start=start, low=0.01, high=0.9, spread=spread)


def _hopper() -> tuple[Knob, ...]:
    return (
        Knob(gpus=HOPPER, curve="matmul.bf16", start=0.65, low=0.4, high=0.9),
        Knob(gpus=HOPPER, curve="matmul.fp8", start=0.55, low=0.3, high=0.9),
        Knob(gpus=HOPPER, curve="grouped_matmul.bf16", start=0.5, low=0.2, high=0.9, spread=1.3),
        Knob(gpus=HOPPER, curve="attention.forward", start=0.9, low=0.3, high=1.0),
        Knob(gpus=HOPPER, curve="attention.backward", start=0.67, low=0.3, high=1.0),
        Knob(gpus=HOPPER, curve="elementwise", start=0.75, low=0.4, high=0.95),
        Knob(gpus=HOPPER, curve="permute", start=0.5, low=0.1, high=0.95),
    )


def _ampere() -> tuple[Knob, ...]:
    return (
        Knob(gpus=("a100-80g",), curve="matmul.bf16", start=0.72, low=0.5, high=0.95),
        Knob(gpus=("a100-80g",), curve="elementwise", start=0.8, low=0.5, high=0.95),
    )


def turned(gpu: Gpu, file: str, values: Mapping[Knob, float]) -> Gpu:
    """A GPU with other constants."""
    curves, waits = dict(gpu.curves), dict(gpu.host_expert_s)
    plain = {name: getattr(gpu, name) for name in _PLAIN}
    for knob, value in values.items():
        if file not in knob.gpus:
            continue
        kind, _, precision = knob.curve.partition(".")
        if kind == "host_expert_s":
            waits[precision] = value
        elif kind in _PLAIN:
            plain[kind] = value
        else:
            curves[knob.curve] = replace(curves[knob.curve], peak_share=value)
    return replace(gpu, curves=curves, host_expert_s=waits, **plain)


def fit(cases: Sequence[Case], chosen: Sequence[Knob]) -> dict[Knob, float]:
    """Finds constants that make the logarithms of estimates and times agree best.

    Every constant is also drawn to its start: a half has no more rows than there are constants.
    """
    clusters = {id(case): cluster_of(case) for case in cases}
    noises = [_noise(case, cases) for case in cases]

    def residuals(logs: Iterable[float]) -> list[float]:
        values = {knob: exp(value) for knob, value in zip(chosen, logs, strict=True)}
        misses = []
        for case, noise in zip(cases, noises, strict=True):
            cluster: Cluster = clusters[id(case)]
            gpu = turned(cluster.gpu, file_of(case), values)
            step = predict(case, replace(cluster, gpu=gpu)).step_s
            misses.append(log(step / (case.step_s or step)) / noise)
        drawn = [log(values[knob] / knob.start) / log(knob.spread) for knob in chosen]
        return [*misses, *drawn]

    result = least_squares(
        residuals,
        [log(knob.start) for knob in chosen],
        bounds=([log(knob.low) for knob in chosen], [log(knob.high) for knob in chosen]),
        loss="soft_l1",
        diff_step=1e-3,
        max_nfev=40,
    )
    return {knob: exp(value) for knob, value in zip(chosen, result.x, strict=True)}


# What a row and its like differ by where nothing but the release does: caveat 11 of the data.
_NOISE = 0.05

# What a row differs by whose software is not the one that the constants are for: an older release
# where a later one chose another layout for the same model, or a precision that is a mixture.
_LOOSE_NOISE = 0.3


def _noise(case: Case, cases: Sequence[Case]) -> float:
    # Hybrid models in "nvfp4" mix it with MXFP8 and bf16 in shares that no row states.
    mixed = case.model.precision == "nvfp4" and case.model.name.startswith("nemotron")
    return _LOOSE_NOISE if mixed or superseded(case, cases) else _NOISE


def superseded(case: Case, cases: Sequence[Case]) -> bool:
    """Whether a later release runs the same model on as many of the same GPUs otherwise."""
    return any(
        other.release > case.release
        and (other.model.name, other.gpu, other.num_gpus, other.model.precision)
        == (case.model.name, case.gpu, case.num_gpus, case.model.precision)
        for other in cases
        if other.source == case.source
    )


def file_of(case: Case) -> str:
    """Name of the file that a case's GPU is in."""
    return SIMUMAX_MACHINE.stem if case.source == "simumax" else _FILES[case.gpu]


def _path_of(file: str) -> Path:
    if file == SIMUMAX_MACHINE.stem:
        return SIMUMAX_MACHINE
    return Path(str(files("megatron_mosaic.cluster") / "gpus" / f"{file}.yaml"))


def write(values: Mapping[Knob, float], *, note: str) -> None:
    """Writes fitted constants into the files of their GPUs, with where they are from."""
    for knob, value in values.items():
        for gpu in knob.gpus:
            path = _path_of(gpu)
            text = path.read_text()
            kind, _, precision = knob.curve.partition(".")
            if kind == "host_expert_s":
                found = rf"(host_expert_s:.*\b{precision}: )[0-9.e+-]+"
                text = re.sub(found, rf"\g<1>{value:.2e}", text)
            elif kind in _PLAIN:
                text = re.sub(rf"({kind}: )[0-9.e+-]+", rf"\g<1>{value:.2e}", text)
            else:
                start = re.escape(f"{knob.curve}: {{peak_share: ")
                line = rf"(?m)^( +{start})[0-9.]+(.*source: ')[^;']*"
                text = re.sub(line, rf"\g<1>{value:.4g}\g<2>{note}", text)
            path.write_text(text)


def main(argv: Sequence[str] | None = None) -> int:
    """Fits, prints, and writes where asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="write the constants to the files")
    args = parser.parse_args(argv)
    first, _ = halves(fitted_cases(read_points()))
    used = {file_of(case) for case in first}
    chosen = [knob for knob in knobs() if used & set(knob.gpus)]
    values = fit(first, chosen)
    for knob, value in values.items():
        print(f"{'/'.join(knob.gpus):28} {knob.curve:28} {knob.start:10.4g} -> {value:10.4g}")
    if args.write:
        date = datetime.now(UTC).date().isoformat()
        write(values, note=f"benchmarks/fit_efficiencies.py, half A, {date}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
