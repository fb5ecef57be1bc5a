"""Runs a plan on this machine's CPU, its ranks as processes and its modules thin."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_mosaic.errors import PlanError
from megatron_mosaic.layout.plan import Plan

if TYPE_CHECKING:
    from megatron_mosaic.rehearsal.fold import Folded
    from megatron_mosaic.rehearsal.rehearsal import Result

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
    return "\n".join([*lines, *(f"note: {note}" for note in folded.notes)])


def _verdict(result: "Result", folded: "Folded") -> str:
    lines = []
    for finding in result.findings:
        lines.append(f"{'ok    ' if finding.passed else 'FAILED'}  {finding.subject}")
        lines += [f"        {line}" for line in finding.shown()]
    lines += [f"not proven: {what}" for what in (*UNPROVEN, *folded.notes)]
    lines.append(
        f"{'proven' if result.passed else 'not as planned'}: {folded.plan.world_size} ranks, "
        f"{result.wall_s:.0f} s, at most {result.peak_bytes / 2**30:.1f} GiB"
    )
    return "\n".join(lines)
