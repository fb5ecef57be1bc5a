"""Writes down when each task ran, for a picture of a step as measured."""

import json
from pathlib import Path
from typing import IO

from megatron_mosaic.schedule.task import Task


class TaskTrace:
    """One file of JSON lines for a rank: step, task, begin and end by the host's clock.

    On one machine the clock is the same for all ranks. A device that works asynchronously ends
    a task later than the host does, so this is for ranks that compute on CPU.

    Args:
        folder: Where ``rank<r>.jsonl`` goes; it is made if need be.
        rank: Global rank.
    """

    def __init__(self, folder: Path, *, rank: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._file: IO[str] = (folder / f"rank{rank}.jsonl").open("w", encoding="utf-8")
        self._step = -1
        self._records = False

    def begin(self, *, forward_only: bool) -> None:
        """Starts the next step; evaluation is not written down."""
        self._file.flush()
        self._records = not forward_only
        self._step += self._records

    def __call__(self, task: Task, start_s: float, end_s: float) -> None:
        """Writes one task."""
        if not self._records:
            return
        entry = {"step": self._step, **task._asdict(), "start_s": start_s, "end_s": end_s}
        self._file.write(json.dumps(entry) + "\n")
