"""Plans and checks heterogeneous layouts for Megatron-LM."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from megatron_mosaic.errors import LayoutError, PlanError
from megatron_mosaic.layout.ownership import encoder_samples
from megatron_mosaic.layout.plan import Plan, check_world_size
from megatron_mosaic.layout.ranks import show_ranks


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command. Returns 0, or 2 if the user's input cannot work."""
    args = _parser().parse_args(argv)
    try:
        args.run(args)
    except (PlanError, LayoutError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _check(args: argparse.Namespace) -> None:
    plan = Plan.load(args.plan)
    if args.world_size is not None:
        check_world_size(plan, args.world_size, where=str(args.plan))
    print(_summary(plan))
    print()
    print(_table(plan))


def _show(args: argparse.Namespace) -> None:
    from megatron_mosaic.schedule.build import build_schedule
    from megatron_mosaic.schedule.drawing import draw

    plan = Plan.load(args.plan)
    schedule = build_schedule(plan, num_microbatches=plan.num_microbatches, forward_only=False)
    print(draw(schedule))


def _summary(plan: Plan) -> str:
    """What runs, in words."""
    samples = plan.micro_batch_size * plan.language.data_parallel_size
    lines = [
        f"{plan.global_batch_size} samples per step: "
        f"{plan.num_microbatches} microbatches of {samples} samples",
        f"schedule {plan.schedule.kind} on {plan.world_size} ranks",
    ]
    hosts = {rank for placement in plan.modules.values() for rank in placement.ranks}
    idle = [rank for rank in range(plan.world_size) if rank not in hosts]
    if idle:
        lines.append(f"idle ranks {show_ranks(idle)}")
    lines.append(f"digest {plan.digest()[:16]}")
    return "\n".join(lines)


def _table(plan: Plan) -> str:
    """One line for each module; samples are those of one replica in one task."""
    # The experts' grid is shown where a plan says something about it.
    splits_experts = any(placement.splits_experts for placement in plan.modules.values())
    expert_heads = ("etp", "ep", "edp") if splits_experts else ()
    heads = ("tp", "cp", "dp", "pp", *expert_heads, "microbatches/task", "samples/task")
    rows: list[tuple[str, ...]] = [("module", "ranks", *heads)]
    for name, placement in plan.modules.items():
        num_microbatches, samples = _task_size(plan, name)
        sizes = map(str, (*placement.shape, *placement.expert_shape[: len(expert_heads)]))
        rows.append((name, show_ranks(placement.ranks), *sizes, str(num_microbatches), samples))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def _task_size(plan: Plan, name: str) -> tuple[int, str]:
    """Microbatches of one task of a module, and the samples that a replica has in it."""
    if name == "language":
        return 1, str(plan.micro_batch_size)
    num_microbatches = 1
    if plan.schedule.kind == "colocated":
        num_microbatches = plan.schedule.encoder_group or plan.num_microbatches
    num_samples = num_microbatches * plan.micro_batch_size * plan.language.data_parallel_size
    replicas = plan.modules[name].data_parallel_size
    sizes = {part.size for part in encoder_samples(num_samples, data_parallel_size=replicas)}
    return num_microbatches, "-".join(map(str, sorted(sizes)))


class _Parser(argparse.ArgumentParser):
    """Reports a wrong command line in one line, as every other error."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; run '{self.prog} --help'\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="megatron-mosaic", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    check = commands.add_parser("check", help="check a plan and print its layout")
    check.set_defaults(run=_check)
    check.add_argument("plan", type=Path, help="plan file, YAML")
    check.add_argument("--world-size", type=int, help="ranks that will be launched")

    show = commands.add_parser("show", help="print the schedule of every rank")
    show.set_defaults(run=_show)
    show.add_argument("plan", type=Path, help="plan file, YAML")
    return parser


if __name__ == "__main__":
    sys.exit(main())
