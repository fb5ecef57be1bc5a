"""What modules gain and lose when they share one GPU, in parts of at most ten minutes each.

python -m benchmarks.sharing_gpu run --part p0 [--output FILE.json] [--budget-s 480] [--cases ...]
python -m benchmarks.sharing_gpu run --part all --dry-run --output FILE.json
python -m benchmarks.sharing_gpu merge INTO.json FILE.json ...
python -m benchmarks.sharing_gpu summary [FILE.json]

Parts: p0 what can be split and where kernels ran, p1 operations by SM count, p2 pairs beside each
other, p3 what lanes cost, p4 whole steps in all arms, p5 gaps filled. A file keeps what other
calls have put there; a part that runs again replaces its own rows.
"""

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import RESULTS, describe_machine
from benchmarks.sharing import curves, gaps, multiplexing, overheads, pairs, probe
from benchmarks.sharing.results import merge_files, put_row, read, write
from benchmarks.sharing.sensors import Sensors
from benchmarks.sharing.setting import Setting, setting_on
from benchmarks.sharing.summary import print_summary

OUTPUT = RESULTS / "sharing_gpu.json"

Rows = Iterator[dict[str, Any]]
Part = tuple[Callable[[Setting, argparse.Namespace], Rows], Callable[[Any], str]]

PARTS: Mapping[str, Part] = {
    "p0": (lambda setting, _: probe.measure(setting), probe.summary),
    "p1": (lambda setting, _: curves.measure(setting), curves.summary),
    "p2": (lambda setting, _: pairs.measure(setting), pairs.summary),
    "p3": (lambda setting, _: overheads.measure(setting), overheads.summary),
    "p4": (
        lambda setting, options: multiplexing.measure(
            setting, cluster=options.cluster, only=options.cases
        ),
        multiplexing.summary,
    ),
    "p5": (lambda setting, _: gaps.measure(setting), gaps.summary),
}


def describe_device(setting: Setting) -> dict[str, Any]:
    """The machine, and the GPU with its driver and limits."""
    device: dict[str, Any] = {"name": "host", "pretended_sms": setting.num_sms}
    if not setting.tiny:
        properties = torch.cuda.get_device_properties(setting.device)
        device = {
            "name": properties.name,
            "memory_bytes": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
            **Sensors(setting.device).describe(),
        }
    return {**describe_machine(), "device": device}


def run(options: argparse.Namespace) -> None:
    """Measures parts and writes after every row, as a call may be cut short."""
    setting = setting_on(
        "cpu" if options.dry_run else "cuda", budget_s=options.budget_s, rounds=options.rounds
    )
    for name in PARTS if "all" in options.part else options.part:
        measure, told = PARTS[name]
        machine = describe_device(setting)
        print(f"{name} on {machine['device']['name']}", flush=True)
        for row in measure(setting, options):
            print(told(row), flush=True)
            write(options.output, put_row(read(options.output), name, row, machine=machine))


def main(argv: Sequence[str] | None = None) -> None:
    """Runs one command."""
    options = _parser().parse_args(argv)
    options.command(options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="modules that share a GPU")
    commands = parser.add_subparsers(required=True)
    running = commands.add_parser("run", help="measure a part")
    running.set_defaults(command=_on_own_stream)
    running.add_argument("--part", choices=[*PARTS, "all"], nargs="+", required=True)
    running.add_argument("--output", type=Path, default=OUTPUT)
    running.add_argument("--budget-s", type=float, default=480.0, help="nothing new after that")
    running.add_argument("--rounds", type=int, help="turns of every arm")
    running.add_argument("--cases", nargs="+", default=(), help="p4: parts of names of cases")
    running.add_argument("--cluster", default="h200", help="p4: what the planner plans for")
    running.add_argument("--dry-run", action="store_true", help="something tiny, on the host")
    merging = commands.add_parser("merge", help="put results of several calls together")
    merging.set_defaults(command=lambda options: merge_files(options.into, options.files))
    merging.add_argument("into", type=Path)
    merging.add_argument("files", type=Path, nargs="+")
    telling = commands.add_parser("summary", help="print tables and draw the chart")
    telling.set_defaults(command=lambda options: print_summary(options.file))
    telling.add_argument("file", type=Path, nargs="?", default=OUTPUT)
    return parser


def _on_own_stream(options: argparse.Namespace) -> None:
    """Runs in a stream that can be captured: the default one cannot."""
    if options.dry_run:
        run(options)
        return
    with torch.cuda.stream(torch.cuda.Stream()):
        run(options)


if __name__ == "__main__":
    main()
