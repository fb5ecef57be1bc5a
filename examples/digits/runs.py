"""The demo's training runs: one script, one set of arguments, several layouts."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path

from examples.digits.training_log import TrainingLog

FOLDER = Path(__file__).parent
SCRIPT = FOLDER / "pretrain_digits.py"
NUM_STEPS = 120
GLOBAL_BATCH_SIZE = 240
# 4 patches and the class token of the image, then 6 tokens of text.
LANGUAGE_TOKENS_PER_SAMPLE = 11

_TIME_LIMIT_S = 600.0
# torchrun gives its ranks 30 s to end before it kills them.
_FAREWELL_S = 40.0

ARGUMENTS = (
    # The model: two small transformers of equal width.
    *("--encoder-num-layers", "2", "--decoder-num-layers", "2", "--hidden-size", "64"),
    *("--num-attention-heads", "4", "--ffn-hidden-size", "128", "--init-method-std", "0.1"),
    *("--img-h", "8", "--img-w", "8", "--patch-dim", "4", "--seq-length", "7"),
    *("--max-position-embeddings", "16", "--transformer-impl", "local"),
    # As many rows for tokens with tensor parallelism as without.
    *("--make-vocab-size-divisible-by", "16"),
    # Without dropout, and with the same microbatches, every layout computes the same losses.
    *("--attention-dropout", "0", "--hidden-dropout", "0"),
    *("--micro-batch-size", "60", "--global-batch-size", str(GLOBAL_BATCH_SIZE)),
    *("--train-iters", str(NUM_STEPS), "--lr", "5e-3", "--min-lr", "1e-5"),
    *("--lr-decay-style", "cosine", "--lr-warmup-iters", "10", "--weight-decay", "0.1"),
    # One evaluation, at the end: 360 held-out images with ten names each, 240 samples at a time.
    *("--eval-iters", "15", "--eval-interval", str(NUM_STEPS + 1)),
    *("--log-interval", "1", "--num-workers", "0", "--no-gradient-accumulation-fusion"),
    *("--distributed-backend", "gloo"),
)


class RunError(Exception):
    """A training run failed."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """A training run of the demo.

    Args:
        name: Short name, also of its files.
        title: What is special about it, for people.
        num_steps: Steps that it takes.
        arguments: What it adds to the common arguments.
        plan: Its plan; None for stock Megatron in one process.
    """

    name: str
    title: str
    num_steps: int = NUM_STEPS
    arguments: Sequence[str] = ()
    plan: Path | None = None

    def command(self) -> list[str]:
        """The command line."""
        run = ["-m", "megatron_mosaic.run", "--mosaic-device", "cpu", str(SCRIPT), *ARGUMENTS]
        run += self.arguments
        if self.plan is not None:
            return [sys.executable, *run, "--mosaic-plan", str(self.plan)]
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
        return [sys.executable, *launch, *run]


@dataclass(kw_only=True)
class Outcome:
    """What a run did, and how long the whole command took."""

    log: TrainingLog = field(default_factory=TrainingLog)
    total_s: float = 0.0


def execute(run: Run, *, folder: Path, follow: Callable[[TrainingLog], None]) -> Outcome:
    """Runs a command to its end and reads its log on the way.

    Args:
        run: The run.
        folder: Where ``<name>.log`` goes.
        follow: Is called after every line that says something.

    Raises:
        RunError: The command failed or took too long; the message ends with the end of its log.
    """
    path = folder / f"{run.name}.log"
    outcome = Outcome()
    started_s = time.monotonic()
    with path.open("w", encoding="utf-8") as copy, _started(run.command()) as process:
        assert process.stdout is not None
        for line in process.stdout:
            copy.write(line)
            if outcome.log.read(line):
                follow(outcome.log)
    outcome.total_s = time.monotonic() - started_s
    if fault := _fault(run, outcome, status=process.returncode):
        raise RunError(f"{run.title}: {fault}\n{_end_of(path)}")
    return outcome


def _fault(run: Run, outcome: Outcome, *, status: int) -> str | None:
    """Says what went wrong, if anything."""
    if outcome.total_s > _TIME_LIMIT_S:
        return f"stopped after {_TIME_LIMIT_S:.0f} s"
    if status != 0:
        return f"exit status {status}"
    if len(outcome.log.losses) != run.num_steps:
        return f"{len(outcome.log.losses)} of {run.num_steps} steps are in its log"
    return None


@contextmanager
def _started(command: Sequence[str]) -> Iterator[subprocess.Popen[str]]:
    """Starts a command; neither it nor its ranks outlive the block or the time limit."""
    process = subprocess.Popen(
        command,
        cwd=FOLDER.parents[1],
        env={"OMP_NUM_THREADS": "1", **os.environ},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    # It is torchrun, which ends its ranks when it is asked to end.
    limit = threading.Timer(_TIME_LIMIT_S, process.terminate)
    limit.start()
    try:
        yield process
        process.wait()
    finally:
        limit.cancel()
        _end(process)


def _end(process: subprocess.Popen[str]) -> None:
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(_FAREWELL_S)
    except subprocess.TimeoutExpired:
        process.kill()


def _end_of(path: Path, *, num_lines: int = 25) -> str:
    """The last lines of a log before torchrun sums up that its ranks have ended."""
    lines = path.read_text(encoding="utf-8").splitlines()
    own = list(takewhile(lambda line: "torch/distributed/elastic/" not in line, lines))
    return "\n".join(["...", *own[-num_lines:], f"the whole log: {path}"])
