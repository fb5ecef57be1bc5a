"""The ranks of the tests: those of a rehearsal, with what tests import beside Megatron."""

from pathlib import Path

from megatron_mosaic.rehearsal import ranks
from megatron_mosaic.rehearsal.ranks import (
    IMPORTED_FIRST,
    Ended,
    RanksError,
    run_ranks,
    run_to_the_end,
)

__all__ = [
    "IMPORTED_FIRST",
    "ROOT",
    "Ended",
    "RanksError",
    "run_ranks",
    "run_to_the_end",
    "start_server",
]

ROOT = Path(__file__).resolve().parent.parent


def start_server() -> None:
    """Starts the process that ranks are forked from, without waiting for its imports."""
    ranks.start_server(preload="tests.preload")
