"""Runs in which something befalls a rank at a moment that a test chooses, and what they print."""

import multiprocessing
import os
import random
import re
import signal
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import torch

from tests.parity.record import ARGUMENTS, OPTIMIZERS
from tests.parity.training import options_of, script_of
from tests.ranks import Ended, run_to_the_end

NUM_STEPS = 4
SAMPLES = 16  # of a step
OPTIONS = ["--use-distributed-optimizer", *OPTIMIZERS["adam"]]
# Forks on a busy machine are slow to beat; the default is 30 s.
HEARTBEAT = ["--mosaic-heartbeat-timeout-s", "10"]


@dataclass(frozen=True, kw_only=True)
class Strike:
    """What befalls some ranks, when one of them comes to a call of the script's forward step.

    Args:
        kind: ``kill`` and ``terminate``, signals to ``ranks`` and the loaders of the first;
            ``worker``, a process of the first rank's loader is killed; ``nan``, a sample of the
            step has a pixel that is not a number; ``unreadable``, one does not decode.
        ranks: Whom it befalls; not for samples.
        step: Step of training, from 1.
        call: Forward step in it, from 0, or the sample.
        then_s: How long the rank stands still when it has fallen.
    """

    kind: str
    ranks: tuple[int, ...] = ()
    step: int
    call: int
    then_s: float = 0.0

    @classmethod
    def at_random(cls, chance: random.Random, kind: str, ranks: Sequence[int] = ()) -> "Strike":
        """At any moment after the first step; every rank has two calls at least."""
        step = chance.randint(2, NUM_STEPS - 1)
        call = chance.randrange(2 if ranks else SAMPLES)
        return cls(kind=kind, ranks=tuple(ranks), step=step, call=call)

    @property
    def sample(self) -> int:
        """The sample, by its place in the data set."""
        return (self.step - 1) * SAMPLES + self.call


def train(
    rank: int, plan: str, options: list[str], strike: Strike | None, folder: str | None
) -> None:
    """Trains under a plan and prints the losses of every step; ``folder`` has the ranks' pids."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    from megatron_mosaic.host.cpu import run_on_cpu

    run_on_cpu()
    # Python's own way on Linux here; ranks of tests have inherited another from their server.
    multiprocessing.set_start_method("fork", force=True)
    from megatron_mosaic.host import training
    from megatron_mosaic.host.arguments import parse_and_validate_args

    print_losses()
    # Megatron's own way out of starting a fresh interpreter for each rank's writer.
    filesystem_async.get_write_results_queue(mp_mode="fork")
    script = import_module(f"tests.parity.{script_of(Path(plan))}")
    if folder is not None:
        (Path(folder) / f"pid{rank}").write_text(str(os.getpid()))
    if hasattr(script, "loss_func"):
        script.loss_func = checked(script.loss_func)
    if strike is not None and rank in strike.ranks[:1]:
        script.forward_step = struck(script.forward_step, strike, folder)
    if strike is not None and not strike.ranks:
        script.ImageTextSamples = type("Damaged", (Damaged, script.ImageTextSamples), {})
        script.ImageTextSamples.strike = strike
    own = [*ARGUMENTS, *OPTIONS, *options_of(Path(plan))]
    sys.argv = ["script", *own, *options, "--mosaic-plan", plan]
    try:
        script.main(parse_and_validate_args, training.pretrain)
    except SystemExit as end:
        print(f"exit status {end.code}", flush=True)
        if end.code:
            raise


def print_losses() -> None:
    """Has every rank print its losses: Megatron's second line averages the first two steps."""
    from megatron_mosaic.host import training
    from megatron_mosaic.host.forward_backward import PlanForwardBackward

    class PrintingForwardBackward(PlanForwardBackward):
        def __call__(self, *, forward_only=False, **arguments):
            losses = super().__call__(forward_only=forward_only, **arguments)
            if not forward_only:
                step = self._progress.place.iteration
                print(f"losses {step} {losses[0]['lm loss'].tolist()}", flush=True)
            return losses

    training.PlanForwardBackward = PrintingForwardBackward


class Damaged:
    """A data set in which the sample of a strike is damaged."""

    strike: Strike

    def __getitem__(self, index):
        sample = super().__getitem__(index)  # type: ignore[misc]
        if index == self.strike.sample:
            if self.strike.kind == "unreadable":
                raise OSError("image file is truncated")
            sample["image"][0, 0, 0, 0] = float("nan")
        return sample


def checked(loss_func):
    """A loss function that has Megatron check its loss, as that of ``pretrain_gpt.py``."""
    from megatron.core.rerun_state_machine import get_rerun_state_machine

    def with_check(loss_mask, output_tensor):
        loss, *rest = loss_func(loss_mask, output_tensor)
        get_rerun_state_machine().validate_result(
            result=loss, rejection_func=torch.isnan, message="found NaN in the loss", fatal=True
        )
        return loss, *rest

    return with_check


def struck(forward_step, strike: Strike, folder: str | None):
    """A script's forward step in which the strike falls, once."""
    from megatron.training import get_args

    calls = Counter()

    def step(data_iterator, model):
        now = get_args().curr_iteration + 1
        if model.training:
            if (now, calls[now]) == (strike.step, strike.call):
                print(f"struck in step {now}", flush=True)
                _fall(strike, folder)
                time.sleep(strike.then_s)
            calls[now] += 1
        return forward_step(data_iterator, model)

    return step


def _fall(strike: Strike, folder: str | None) -> None:
    loaders = [each for each in multiprocessing.active_children() if "Manager" not in each.name]
    if strike.kind == "worker":
        os.kill(loaders[0].pid or 0, signal.SIGKILL)
        return
    assert folder is not None
    number = signal.SIGKILL if strike.kind == "kill" else signal.SIGTERM
    for loader in loaders:
        os.kill(loader.pid or 0, number)
    # Itself last: the others must still hear of it.
    for rank in reversed(strike.ranks):
        os.kill(int((Path(folder) / f"pid{rank}").read_text()), number)


def run(
    plan: Path | str,
    *options: str,
    world_size: int,
    strike: Strike | None = None,
    folder: Path | None = None,
    timeout_s: float = 150.0,
) -> list[Ended]:
    """Runs the ranks of a plan to their end, whatever befalls them."""
    if folder is not None:
        folder.mkdir(exist_ok=True)
    where = None if folder is None else str(folder)
    arguments = (str(plan), [*HEARTBEAT, *options], strike, where)
    return run_to_the_end(train, world_size, *arguments, timeout_s=timeout_s)


def losses_of(ended: Sequence[Ended]) -> dict[int, list[float]]:
    """Losses of the whole batch as printed by rank 0, sum and tokens, by step."""
    found = re.findall(r"losses (\d+) \[(.*)\]", ended[0].output)
    return {int(step): [float(each) for each in losses.split(",")] for step, losses in found}


def errors_of(ended: Sequence[Ended]) -> list[list[str]]:
    """Lines of errors of each rank."""
    return [re.findall(r"^error: .*", end.output, re.MULTILINE) for end in ended]
