"""Fits efficiency constants to one half of the published times, and writes them to the GPU files.

``python -m benchmarks.fit_efficiencies [--write]``
"""

import argparse
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.resources import files
from math import exp, log
from pathlib import Path

from scipy.optimize import least_squares

from benchmarks.halves import fitted_cases, halves
from benchmarks.predictions import cluster_of, predict
from benchmarks.published_points import Case, read_points
from megatron_mosaic.cluster.cluster_file import load_gpu
from megatron_mosaic.cluster.spec import Cluster, Gpu

BLACKWELL = ("b200", "gb200", "b300", "gb300")
HOPPER = ("h100", "h200")
_FILES = {"A100": "a100-80g"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Knob:
    """A constant that the fit may turn, for one GPU or for several of one generation.

    Args:
        gpus: Files of the GPUs that share it.
        curve: The curve, ``host_operation_s``, or ``host_wait_s.<graph>``.
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
    # Starts of Blackwell's bf16 operators: shares of large sizes that SimuMax measured on a B200,
    # configs/system/b200_bf16_ceperm.json (4dcaae5) of its repository.
    shared = (
        Knob(gpus=BLACKWELL, curve="weight_gradient.matmul.bf16", start=0.455, low=0.3, high=0.8),
        Knob(gpus=BLACKWELL, curve="attention.forward", start=0.573, low=0.3, high=0.9),
        Knob(gpus=BLACKWELL, curve="attention.backward", start=0.443, low=0.2, high=0.8),
        Knob(gpus=BLACKWELL, curve="latent_attention.forward", start=0.42, low=0.2, high=0.9),
        Knob(gpus=BLACKWELL, curve="latent_attention.backward", start=0.32, low=0.15, high=0.8),
        Knob(gpus=BLACKWELL, curve="grouped_matmul.bf16", start=0.55, low=0.2, high=0.9),
        Knob(gpus=BLACKWELL, curve="elementwise", start=0.7, low=0.3, high=0.95),
        Knob(gpus=BLACKWELL, curve="permute", start=0.5, low=0.1, high=0.95),
    )
    rates = [
        Knob(gpus=("b200", "b300"), curve="matmul.bf16", start=0.485, low=0.3, high=0.9),
        Knob(gpus=("gb200", "gb300"), curve="matmul.bf16", start=0.6, low=0.3, high=0.9, spread=1.3),
    ]
    for gpu in BLACKWELL:
        rates.append(
            Knob(gpus=(gpu,), curve="matmul.fp8", start=0.55, low=0.3, high=0.95, spread=1.3)
        )
    rates += [
        Knob(gpus=(gpu,), curve="matmul.nvfp4", start=start, low=0.1, high=0.9, spread=1.5)
        for gpu, start in (("gb200", 0.45), ("gb300", 0.35), ("b300", 0.35))
    ]
    experts = (
        Knob(gpus=BLACKWELL, curve="grouped_matmul.fp8", start=0.45, low=0.1, high=0.9, spread=1.5),
        Knob(gpus=BLACKWELL, curve="recurrence.bf16", start=0.1, low=0.01, high=0.6, spread=2),
        Knob(gpus=BLACKWELL, curve="host_wait_s.none", start=1e-3, low=1e-5, high=1e-2, spread=3),
        Knob(gpus=BLACKWELL, curve="host_wait_s.partial", start=5e-4, low=1e-5, high=1e-2, spread=3),
        Knob(gpus=BLACKWELL, curve="host_operation_s", start=4e-4, low=1e-5, high=2e-3, spread=1.5),
    )
    return (*shared, *rates, *experts, *_hopper(), *_ampere())


def _hopper() -> tuple[Knob, ...]:
    return (
        Knob(gpus=HOPPER, curve="matmul.bf16", start=0.65, low=0.4, high=0.9),
        Knob(gpus=HOPPER, curve="matmul.fp8", start=0.55, low=0.3, high=0.9),
        Knob(gpus=HOPPER, curve="grouped_matmul.bf16", start=0.5, low=0.2, high=0.9, spread=1.5),
        Knob(gpus=HOPPER, curve="attention.forward", start=0.6, low=0.2, high=0.9),
        Knob(gpus=HOPPER, curve="attention.backward", start=0.45, low=0.2, high=0.9),
        Knob(gpus=HOPPER, curve="elementwise", start=0.75, low=0.4, high=0.95),
        Knob(gpus=HOPPER, curve="permute", start=0.5, low=0.1, high=0.95, spread=1.5),
        Knob(gpus=HOPPER, curve="recurrence.bf16", start=0.1, low=0.01, high=0.6, spread=2),
        Knob(gpus=HOPPER, curve="host_wait_s.none", start=1e-3, low=1e-5, high=1e-2, spread=3),
        Knob(gpus=HOPPER, curve="host_wait_s.partial", start=5e-4, low=1e-5, high=1e-2, spread=3),
        Knob(gpus=HOPPER, curve="host_operation_s", start=4e-4, low=1e-5, high=2e-3, spread=1.5),
    )


def _ampere() -> tuple[Knob, ...]:
    return (
        Knob(gpus=("a100-80g",), curve="matmul.bf16", start=0.72, low=0.5, high=0.95),
        Knob(gpus=("a100-80g",), curve="elementwise", start=0.8, low=0.5, high=0.95),
    )


def turned(gpu: Gpu, file: str, values: Mapping[Knob, float]) -> Gpu:
    """A GPU with other constants."""
    curves, waits, operation = dict(gpu.curves), dict(gpu.host_wait_s), gpu.host_operation_s
    for knob, value in values.items():
        if file not in knob.gpus:
            continue
        kind, _, graph = knob.curve.partition(".")
        if kind == "host_wait_s":
            waits[graph] = value
        elif kind == "host_operation_s":
            operation = value
        else:
            curves[knob.curve] = replace(curves[knob.curve], peak_share=value)
    return replace(gpu, curves=curves, host_wait_s=waits, host_operation_s=operation)


def fit(cases: Sequence[Case], chosen: Sequence[Knob]) -> dict[Knob, float]:
    """Finds constants that make the logarithms of estimates and times agree best.

    Every constant is also drawn to its start: a half has no more rows than there are constants.
    """
    clusters = {id(case): cluster_of(case) for case in cases}

    def residuals(logs: Iterable[float]) -> list[float]:
        values = {knob: exp(value) for knob, value in zip(chosen, logs, strict=True)}
        misses = []
        for case in cases:
            cluster: Cluster = clusters[id(case)]
            gpu = turned(cluster.gpu, file_of(case.gpu), values)
            step = predict(case, replace(cluster, gpu=gpu)).step_s
            misses.append(log(step / (case.step_s or step)) / _NOISE)
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


def file_of(gpu: str) -> str:
    """Name of a GPU's file."""
    return _FILES.get(gpu, gpu.lower())


def write(values: Mapping[Knob, float], *, note: str) -> None:
    """Writes fitted constants into the files of their GPUs, with where they are from."""
    for knob, value in values.items():
        for gpu in knob.gpus:
            path = Path(str(files("megatron_mosaic.cluster") / "gpus" / f"{gpu}.yaml"))
            text = path.read_text()
            kind, _, graph = knob.curve.partition(".")
            if kind == "host_wait_s":
                text = re.sub(rf"(host_wait_s:.*\b{graph}: )[0-9.e+-]+", rf"\g<1>{value:.2e}", text)
            elif kind == "host_operation_s":
                text = re.sub(r"(host_operation_s: )[0-9.e+-]+", rf"\g<1>{value:.2e}", text)
            else:
                start = re.escape(f"  {knob.curve}: {{peak_share: ")
                line = rf"(?m)^({start})[0-9.]+(.*source: ).*\}}$"
                text = re.sub(line, rf"\g<1>{value:.4g}\g<2>{note}}}", text)
            path.write_text(text)
            load_gpu(gpu)


def main(argv: Sequence[str] | None = None) -> int:
    """Fits, prints, and writes where asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="write the constants to the files")
    args = parser.parse_args(argv)
    first, _ = halves(fitted_cases(read_points()))
    used = {file_of(case.gpu) for case in first}
    chosen = [knob for knob in knobs() if used & set(knob.gpus)]
    values = fit(first, chosen)
    for knob, value in values.items():
        print(f"{'/'.join(knob.gpus):28} {knob.curve:28} {knob.start:10.4g} -> {value:10.4g}")
    if args.write:
        date = datetime.now(UTC).date().isoformat()
        write(values, note=f"'benchmarks/fit_efficiencies.py, half A, {date}'")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
