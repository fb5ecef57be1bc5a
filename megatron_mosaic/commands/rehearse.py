"""Runs a plan on this machine's CPU, its ranks as processes and its modules thin."""

import argparse
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import TYPE_CHECKING

from megatron_mosaic.errors import PlanError
from megatron_mosaic.layout.plan import Plan

if TYPE_CHECKING:
    from megatron_mosaic.rehearsal.fold import Folded
    from megatron_mosaic.rehearsal.rehearsal import Result

# What no run of thin modules on a CPU can show.
UNPROVEN = (
    "kernels of GPUs, NCCL and real links; bf16 and fp8",
    "memory and speed: the modules are thin, the ranks share this machine's cores",
    "the model's own sizes, layers and data: the script is a rehearsal's",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what the command takes."""
    parser.add_argument("plan", type=Path, help="plan file, YAML")
    parser.add_argument(
        "--ranks", type=int, default=64, help="most processes to start; default: 64"
    )
    parser.add_argument(
        "--time-limit",
        type=float,
        default=300.0,
        metavar="S",
        help="end the ranks after so long; default: 300",
    )


def run(args: argparse.Namespace) -> int:
    """Rehearses the plan. Returns 0, or 1 if a launch would not do what the plan says."""
    for name in ("ranks", "time_limit"):
        if getattr(args, name) <= 0:
            option = name.replace("_", "-")
            raise PlanError(f"--{option}={getattr(args, name)} must be > 0; give a positive number")
    from megatron_mosaic.commands.check import check_schedule
    from megatron_mosaic.rehearsal.fold import fold
    from megatron_mosaic.rehearsal.rehearsal import rehearse

    plan = Plan.load(args.plan)
    check_schedule(plan, where=str(args.plan))
    folded = fold(plan, max_ranks=args.ranks, where=str(args.plan))
    _say(_heading(folded))
    result = rehearse(folded.plan, time_limit_s=args.time_limit, say=_say)
    _say(_verdict(result, folded))
    return 0 if result.passed else 1


def _say(text: str) -> None:
    print(text, flush=True)


def _heading(folded: "Folded") -> str:
    plan = folded.plan
    lines = [
        f"rehearses {plan.world_size} ranks, {plan.num_microbatches} microbatches a step, "
        f"schedule {plan.schedule.kind}"
    ]
    return "\n".join([*lines, *(f"rehearses {note}" for note in folded.notes)])


def _verdict(result: "Result", folded: "Folded") -> str:
    lines = []
    for finding in result.findings:
        state = "proven" if finding.passed else "FAILED"
        measure = f" ({finding.measure})" if finding.measure else ""
        lines.append(f"{state}  {finding.subject}{measure}")
        lines += [f"        {line}" for line in finding.shown()]
    lines += [f"not proven: {what}" for what in (*UNPROVEN, *folded.notes)]
    if result.stacks:
        lines.append(f"where each rank was: {_kept(result.stacks)}")
    lines.append(
        f"{'runs as planned' if result.passed else 'does not run as planned'}: "
        f"{folded.plan.world_size} ranks, {result.wall_s:.0f} s, {result.cpu_s:.0f} s of "
        f"processors, {result.peak_bytes / 2**30:.1f} GiB"
    )
    return "\n".join(lines)


def _kept(text: str) -> str:
    with NamedTemporaryFile("w", prefix="rehearsal-", suffix=".txt", delete=False) as file:
        file.write(text)
    return file.name
