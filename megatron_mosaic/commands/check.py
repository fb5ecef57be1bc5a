"""Checks a plan and its schedule, and prints its layout."""

import argparse
import warnings
from pathlib import Path

from megatron_mosaic.errors import PlanError, ScheduleError
from megatron_mosaic.layout.plan import Plan, check_world_size
from megatron_mosaic.layout.ranks import show_ranks
from megatron_mosaic.layout.rows import split_evenly


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what the command takes."""
    parser.add_argument("plan", type=Path, help="plan file, YAML")
    parser.add_argument("--world-size", type=int, help="ranks that will be launched")
    parser.add_argument(
        "--checkpoint", type=Path, help="folder of Megatron's checkpoints that the run will load"
    )


def run(args: argparse.Namespace) -> None:
    """Checks the plan and prints it."""
    plan = Plan.load(args.plan)
    if args.world_size is not None:
        check_world_size(plan, args.world_size, where=str(args.plan))
    check_schedule(plan, where=str(args.plan))
    print(_summary(plan))
    print()
    print(_table(plan))
    if args.checkpoint is not None:
        print()
        _check_checkpoint(args.checkpoint, plan)


def check_schedule(plan: Plan, *, where: str) -> None:
    """Verifies what every rank would run: also an order that was written by hand.

    Raises:
        PlanError: The order is not of the form, or allows fewer live tasks than it needs.
        ScheduleError: The schedule cannot run.
    """
    from megatron_mosaic.schedule.build import build_schedule
    from megatron_mosaic.schedule.verify import verify

    try:
        verify(plan, build_schedule(plan))
    except ScheduleError as error:
        raise ScheduleError(f"{where}: {error}", table=error.table) from None
    except PlanError as error:
        raise PlanError(f"{where}: {error}") from None


def _check_checkpoint(folder: Path, plan: Plan) -> None:
    """Says whether the plan will load a checkpoint, and what of it.

    Raises:
        PlanError: It will not; a line for each reason.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on what only training would miss
        from megatron_mosaic.host.checkpoint_check import check_checkpoint

    verdict = check_checkpoint(folder, plan)
    print("\n".join(verdict.notes))
    if verdict.problems:
        raise PlanError("\nerror: ".join(verdict.problems))


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
    lines += _balance(plan)
    lines.append(f"digest {plan.digest()[:16]}")
    return "\n".join(lines)


def _balance(plan: Plan) -> list[str]:
    """Masks, and what evens out the loads of ranks, where the plan says something of it."""
    lines, attention = [], plan.language.attention
    if attention is not None:
        line, cp = f"attention under the mask {attention.mask}", plan.language.context_parallel_size
        if cp > 1:
            line += f", tokens {attention.tokens} over {cp} ranks, keys {attention.keys}"
        lines.append(line)
    balanced = [name for name, each in plan.modules.items() if each.items == "balanced"]
    if balanced:
        lines.append(f"items of {', '.join(balanced)} go to replicas by cost")
    return lines


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
    if plan.schedule.kind in ("colocated", "bubble_fill", "concurrent"):
        num_microbatches = plan.schedule.group_size(plan.num_microbatches)
    num_samples = num_microbatches * plan.micro_batch_size * plan.language.data_parallel_size
    replicas = plan.modules[name].data_parallel_size
    sizes = {part.size for part in split_evenly(num_samples, replicas)}
    return num_microbatches, "-".join(map(str, sorted(sizes)))
