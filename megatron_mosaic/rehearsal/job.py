"""What every rank of a rehearsal does: trains two steps with a checkpoint between, and resumes."""

import os
import pickle
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from megatron_mosaic.layout.plan import Plan
from megatron_mosaic.rehearsal.isolation import forget_run, lanes_noted
from megatron_mosaic.rehearsal.record import Groups, Record, record_plan, record_stock
from megatron_mosaic.rehearsal.tiny import is_llava, tiny_arguments, tiny_model

NUM_STEPS = 2
SAVED_STEP = 1
PHASES = ("trained a step", "trained both steps", "saved", "resumed")


@dataclass(frozen=True, kw_only=True)
class Job:
    """A rehearsal as every rank is told of it.

    Args:
        plan: Path of the plan that runs.
        folder: Where ranks write checkpoints, and how far they are.
        resume_port: Where ranks meet to resume.
        limit_s: When a rank that stays in one task for so long is lost.
        before: Breaks the runtime of a rank, where a test wants to see that found.
    """

    plan: str
    folder: str
    resume_port: int
    limit_s: float
    before: Callable[[int], None] | None = None

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return Path(self.folder) / "checkpoints"

    def reach(self, phase: int, *, rank: int) -> None:
        """Notes that a rank has come to the end of a phase, from 1."""
        (Path(self.folder) / f"rank{rank}.phase").write_text(str(phase))

    def note_groups(self, groups: Groups, *, rank: int) -> None:
        """Keeps a rank's groups for those who ask why it did not come to the end."""
        (Path(self.folder) / f"rank{rank}.groups").write_bytes(pickle.dumps(groups))

    def groups_of(self, rank: int) -> Groups:
        """Groups that a rank had; none if it never had any."""
        try:
            return pickle.loads((Path(self.folder) / f"rank{rank}.groups").read_bytes())
        except (FileNotFoundError, EOFError):
            return {}

    def phase_of(self, rank: int) -> int:
        """Phases that a rank has behind it."""
        try:
            return int((Path(self.folder) / f"rank{rank}.phase").read_text() or 0)
        except FileNotFoundError:
            return 0


class Runs(NamedTuple):
    """What one rank recorded.

    Args:
        through: Of the run that saved.
        resumed: Of the one that resumed.
        cpu_s: Time of a processor that it took.
    """

    through: Record
    resumed: Record
    cpu_s: float


def rehearse_rank(rank: int, job: Job) -> Runs:
    """Trains, saves and resumes. Called on every rank."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    # Megatron's own way out of starting a fresh interpreter for each rank's writer.
    filesystem_async.get_write_results_queue(mp_mode="fork")
    if job.before is not None:
        job.before(rank)
    through = _run(
        rank,
        job,
        ("--save", str(job.checkpoints), "--save-interval", str(SAVED_STEP), "--eval-iters", "1"),
        after_step=lambda step: job.reach(step, rank=rank),
    )
    job.reach(3, rank=rank)
    os.environ["MASTER_PORT"] = str(job.resume_port)
    resumed = _run(
        rank,
        job,
        ("--load", str(job.checkpoints), "--ckpt-step", str(SAVED_STEP), "--eval-iters", "0"),
    )
    job.reach(4, rank=rank)
    return Runs(through, resumed, time.process_time())


def _run(
    rank: int,
    job: Job,
    options: Sequence[str],
    *,
    after_step: Callable[[int], None] = lambda step: None,
) -> Record:
    plan = Plan.load(job.plan)
    limits = (
        *("--mosaic-task-timeout-s", str(job.limit_s)),
        *("--mosaic-heartbeat-timeout-s", str(job.limit_s)),
    )
    with lanes_noted() as lane:
        record = record_plan(
            script_of(plan),
            [
                *_arguments(job.plan, plan, stock=False),
                *options,
                *limits,
                "--mosaic-plan",
                job.plan,
            ],
            lane=lane,
            with_groups=lambda groups: job.note_groups(groups, rank=rank),
            after_step=after_step,
        )
    forget_run()
    return record


def rehearse_reference(rank: int, path: str) -> Record:
    """Trains as one process. Called on one rank of its own."""
    plan = Plan.load(path)
    return record_stock(script_of(plan), [*_arguments(path, plan, stock=True), "--eval-iters", "1"])


def script_of(plan: Plan) -> str:
    """Module of the script that has the plan's modules."""
    return f"megatron_mosaic.rehearsal.{'llava' if is_llava(plan) else 'mimo'}_script"


def _arguments(path: str, plan: Plan, *, stock: bool) -> list[str]:
    steps = ("--train-iters", str(NUM_STEPS), "--rehearsed-plan", path)
    return [*tiny_arguments(plan, tiny_model(plan), stock=stock), *steps]
