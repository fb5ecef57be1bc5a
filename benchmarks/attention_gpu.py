"""Rate of attention under multimodal masks on one GPU, counted on visible pairs.

python -m benchmarks.attention_gpu [--lengths 8192 16384] [--output FILE.json] [--dry-run]

Beside it dense-mask SDPA, FlexAttention whose block mask torch makes from the same rule, and
causal FlashAttention as the ceiling; and the ranks of a context-parallel group, one after the
other, as far as they compute. Arms take turns, and the first one runs again under another name:
how far those two differ is noise.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.attention_arms import Arm, arms, simulated_ranks
from benchmarks.attention_masks import PRESETS, bench_mask
from benchmarks.machine import RESULTS, describe_machine
from megatron_mosaic.tokens.tiles import visible_pairs

FLOPS_PER_PAIR = 14
"""Of a visible pair, for each channel of each query head: 2 multiplications forward and 5 backward.

Source: Dao, 2023, arXiv:2307.08691, section 4.1: backward counts 2.5 times forward.
"""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What is measured.

    Args:
        lengths: Tokens of the sequences.
        heads: Query heads.
        groups: Heads of keys and values.
        head_dim: Channels of a head.
        dtype: Of the tensors.
        device: Where.
        rounds: Turns of every arm.
        warm_up: Turns before them, in which kernels are compiled.
        cp: Ranks of the simulated groups.
        seed: Of masks and tensors.
    """

    lengths: Sequence[int]
    heads: int
    groups: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device
    rounds: int
    warm_up: int
    cp: Sequence[int]
    seed: int = 0


def setting_of(options: argparse.Namespace) -> Setting:
    """The geometry of an 8B language model on the GPU, or something small on the host."""
    if options.dry_run:
        return Setting(
            lengths=options.lengths or [192],
            heads=4,
            groups=2,
            head_dim=16,
            dtype=torch.float32,
            device=torch.device("cpu"),
            rounds=2,
            warm_up=1,
            cp=[2],
        )
    return Setting(
        lengths=options.lengths or [8192, 16384, 32768, 65536],
        heads=32,
        groups=8,
        head_dim=128,
        dtype=torch.bfloat16,
        device=torch.device("cuda"),
        rounds=10,
        warm_up=3,
        cp=[8],
    )


def measure(setting: Setting) -> Iterator[dict[str, Any]]:
    """Measures every preset at every length, the shortest first."""
    for length in setting.lengths:
        # Kernels are compiled for each length: those for any length may be slower.
        torch.compiler.reset()
        for preset in PRESETS:
            yield measure_mask(setting, preset, length)


def measure_mask(setting: Setting, preset: str, length: int) -> dict[str, Any]:
    """Measures one mask: all arms, and the ranks of groups."""
    mask = bench_mask(preset, length=length, seed=setting.seed)
    pairs = visible_pairs(mask)
    tensors = draw_tensors(setting, length)
    found = arms(mask, tensors)
    times_s = take_turns(found, setting)
    flops = FLOPS_PER_PAIR * setting.heads * setting.head_dim
    causal_pairs = length * (length + 1) // 2
    rows = {}
    for arm in found:
        seen = causal_pairs if arm.causal else pairs
        seconds = times_s[arm.name]
        rows[arm.name] = {
            "median_s": statistics.median(seconds) if seconds else None,
            "times_s": seconds,
            "flops_per_s": flops * seen / statistics.median(seconds) if seconds else None,
            "prepare_s": arm.prepare_s,
            "failed": arm.failed,
        }
    return {
        "preset": preset,
        "length": length,
        "visible_pairs": pairs,
        "arms": rows,
        "of_causal": _ratio(rows["mosaic"], rows["causal_flash"]),
        "again_of_first": _ratio(rows["mosaic_again"], rows["mosaic"]),
        "ranks": [measure_ranks(setting, mask, tensors, cp) for cp in setting.cp],
    }


def _ratio(arm: Mapping[str, Any], other: Mapping[str, Any]) -> float | None:
    """Of the rates on visible pairs, where both arms ran."""
    rate, base = arm["flops_per_s"], other["flops_per_s"]
    return rate / base if rate and base else None


def measure_ranks(setting: Setting, mask: Any, tensors: Any, cp: int) -> dict[str, Any]:
    """Times of the ranks of a group for each way to assign tokens."""
    found: dict[str, Any] = {"cp": cp}
    for method in ("zigzag", "balanced"):
        ranks = simulated_ranks(mask, tensors, cp=cp, method=method)
        times_s = take_turns(ranks, setting)
        medians = [statistics.median(times_s[rank.name] or [0.0]) for rank in ranks]
        found[method] = {
            "median_s": medians,
            "slowest_of_mean": max(medians) / statistics.mean(medians) if any(medians) else None,
            "failed": [rank.failed for rank in ranks if rank.failed],
        }
    return found


def draw_tensors(setting: Setting, length: int) -> list[torch.Tensor]:
    """Queries, keys, values and the gradient of the output, ``[s, 1, heads, d]``."""
    generator = torch.Generator(device=setting.device).manual_seed(setting.seed)
    heads = (setting.heads, setting.groups, setting.groups, setting.heads)
    return [
        torch.randn(
            length,
            1,
            number,
            setting.head_dim,
            generator=generator,
            device=setting.device,
            dtype=setting.dtype,
        )
        for number in heads
    ]


def take_turns(found: Sequence[Arm], setting: Setting) -> dict[str, list[float]]:
    """Runs arms in turn; what an arm cannot do is noted there, and the others go on."""
    times_s: dict[str, list[float]] = {arm.name: [] for arm in found}
    for turn in range(-setting.warm_up, setting.rounds):
        for arm in found:
            if arm.failed:
                continue
            try:
                arm.prepare()
                seconds = timed_s(arm.step, setting.device)
            except (torch.OutOfMemoryError, RuntimeError, NotImplementedError) as error:
                arm.failed = f"{type(error).__name__}: {str(error).splitlines()[0]}"
                continue
            if turn >= 0:
                times_s[arm.name].append(seconds)
    return times_s


def timed_s(step: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one forward and backward pass, by the device's own clock where it has one."""
    if device.type != "cuda":
        start_s = time.perf_counter()
        step()
        return time.perf_counter() - start_s
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def describe_device(device: torch.device) -> Mapping[str, Any]:
    """The GPU, or nothing on a host."""
    if device.type != "cuda":
        return {"name": "host"}
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "capability": f"{properties.major}.{properties.minor}",
        "cuda": torch.version.cuda,
    }


def summary(row: Mapping[str, Any]) -> str:
    """One line: TFLOP/s of each arm, ratios, and the slowest rank over the mean."""
    rates = (
        f"{name} {arm['flops_per_s'] / 1e12:.3g}" if arm["flops_per_s"] else f"{name} failed"
        for name, arm in row["arms"].items()
    )
    ratios = (f"{name} {row[name] or 0:.3f}" for name in ("of_causal", "again_of_first"))
    ranks = (
        f"cp{each['cp']} {method} {each[method]['slowest_of_mean'] or 0:.3f}"
        for each in row["ranks"]
        for method in ("zigzag", "balanced")
    )
    return f"{row['preset']:18} {row['length']:7}  {'  '.join((*rates, *ratios, *ranks))}"


def main(argv: Sequence[str] | None = None) -> None:
    """Measures and writes what was found after every mask, as a run may be cut short."""
    parser = argparse.ArgumentParser(description="rate of attention under multimodal masks")
    parser.add_argument("--lengths", type=int, nargs="+", help="tokens of the sequences")
    parser.add_argument("--output", type=Path, default=RESULTS / "attention_gpu.json")
    parser.add_argument("--dry-run", action="store_true", help="something small, on the host")
    options = parser.parse_args(argv)
    setting = setting_of(options)
    rows: list[dict[str, Any]] = []
    for row in measure(setting):
        rows.append(row)
        print(summary(row), flush=True)
        results = {
            "machine": {**describe_machine(), "device": describe_device(setting.device)},
            "heads": setting.heads,
            "groups": setting.groups,
            "head_dim": setting.head_dim,
            "dtype": str(setting.dtype),
            "seed": setting.seed,
            "masks": rows,
        }
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
