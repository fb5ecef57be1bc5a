"""Trains a plan, and stock Megatron with the same options, and compares the two."""

import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from megatron_mosaic.layout.plan import Plan
from tests.parity.compare import Comparison, Whole, compare, whole
from tests.parity.record import OPTIMIZERS, Record, record_plan, record_stock
from tests.ranks import run_ranks

TIMEOUT_S = 120
# These change who holds or sends what, not what is computed.
LAYOUT_OPTIONS = (
    "--use-distributed-optimizer",
    "--overlap-grad-reduce",
    "--overlap-param-gather",
    "--ddp-bucket-size",
    "4000",
    "--ddp-reduce-scatter-with-fp32-accumulation",
)


def options_of(plan: Path) -> list[str]:
    """Options of the run that the first line of a plan file names."""
    match = re.match(r"# options:(.*)\n", plan.read_text())
    return match[1].split() if match else []


def script_of(plan: Path) -> str:
    """Training script that a line of a plan file names."""
    match = re.search(r"^# script: (\w+)$", plan.read_text(), re.MULTILINE)
    return match[1] if match else "vlm_script"


@cache
def reference(optimizer: str, options: tuple[str, ...], script: str = "vlm_script") -> Whole:
    """Stock Megatron in one process."""
    arguments = [*OPTIMIZERS[optimizer], *options]
    return whole(run_ranks(record_stock, 1, arguments, script, init=False, timeout_s=TIMEOUT_S))


def trained(plan: Path, optimizer: str, faults: tuple[str, ...] = ()) -> list[Record]:
    """What every rank of a plan recorded."""
    arguments = [*OPTIMIZERS[optimizer], *options_of(plan)]
    world_size = Plan.load(plan).world_size
    return run_ranks(
        record_plan,
        world_size,
        str(plan),
        arguments,
        faults,
        script_of(plan),
        init=False,
        timeout_s=TIMEOUT_S,
    )


def compared(
    records: list[Record], plan: Path, optimizer: str, options: Sequence[str] | None = None
) -> Comparison:
    """Compares a plan's ranks with stock Megatron in one process.

    Args:
        options: Those of the run, where they are not the plan file's.
    """
    options = options_of(plan) if options is None else options
    alike = tuple(option for option in options if option not in LAYOUT_OPTIONS)
    return compare(
        whole(records), reference(optimizer, alike, script_of(plan)), adam=optimizer == "adam"
    )
