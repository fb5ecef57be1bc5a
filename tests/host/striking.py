"""Runs in which something befalls a rank at a moment that a test chooses, and what they print."""

import os
import random
import re
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.parity.record import ARGUMENTS, OPTIMIZERS
from tests.parity.training import options_of, script_of
from tests.ranks import Ended, run_to_the_end

NUM_STEPS = 4
OPTIONS = ["--use-distributed-optimizer", *OPTIMIZERS["adam"]]
# Forks on a busy machine are slow to beat; the default is 30 s.
HEARTBEAT = ["--mosaic-heartbeat-timeout-s", "10"]


@dataclass(frozen=True, kw_only=True)
class Strike:
    """What befalls some ranks, when one of them comes to a call of the script's forward step.

    Args:
        kind: ``kill``, with all of ``ranks``; ``terminate``, as ``kill`` but they are asked;
            ``nan``, the loss is not a number; ``worker``, its loader's processes are killed.
        ranks: Whom it befalls.
        step: Step of training, from 1.
        call: Forward step in it, from 0.
    """

    kind: str
    ranks: tuple[int, ...]
    step: int
    call: int

    @classmethod
    def at_random(cls, chance: random.Random, kind: str, ranks: Sequence[int]) -> "Strike":
        """At any moment after the first step; every rank has two calls at least."""
        return cls(
            kind=kind,
            ranks=tuple(ranks),
            step=chance.randint(2, NUM_STEPS - 1),
            call=chance.randrange(2),
        )


def train(
    rank: int, plan: str, options: list[str], strike: Strike | None, folder: str | None
) -> None:
    """Trains under a plan and prints the losses of every step; ``folder`` has the ranks' pids."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    from megatron_mosaic.host.cpu import run_on_cpu

    run_on_cpu()
    from importlib import import_module

    from megatron_mosaic.host import training
    from megatron_mosaic.host.arguments import parse_and_validate_args
    from megatron_mosaic.host.forward_backward import PlanForwardBackward

    class PrintingForwardBackward(PlanForwardBackward):
        """Megatron's second line of losses is an average of the first two steps of a run."""

        def __call__(self, *, forward_only=False, **arguments):
            losses = super().__call__(forward_only=forward_only, **arguments)
            if not forward_only:
                step = self._progress.place.iteration
                print(f"losses {step} {losses[0]['lm loss'].tolist()}", flush=True)
            return losses

    training.PlanForwardBackward = PrintingForwardBackward
    # Megatron's own way out of starting a fresh interpreter for each rank's writer.
    filesystem_async.get_write_results_queue(mp_mode="fork")
    script = import_module(f"tests.parity.{script_of(Path(plan))}")
    if folder is not None:
        (Path(folder) / f"pid{rank}").write_text(str(os.getpid()))
    if strike is not None and rank == strike.ranks[0]:
        script.forward_step = struck(script.forward_step, strike, folder)
    own = [*ARGUMENTS, *OPTIONS, *options_of(Path(plan))]
    sys.argv = ["script", *own, *options, "--mosaic-plan", plan]
    try:
        script.main(parse_and_validate_args, training.pretrain)
    except SystemExit as end:
        print(f"exit status {end.code}", flush=True)
        if end.code:
            raise


def struck(forward_step, strike: Strike, folder: str | None):
    """A script's forward step in which the strike falls, once."""
    from megatron.training import get_args

    calls: dict[int, int] = {}

    def step(data_iterator, model):
        now = get_args().curr_iteration + 1
        if not model.training or now < strike.step:
            return forward_step(data_iterator, model)
        call = calls.setdefault(now, 0)
        calls[now] += 1
        here = (now, call) == (strike.step, strike.call)
        if here and strike.kind in ("kill", "terminate"):
            number = signal.SIGKILL if strike.kind == "kill" else signal.SIGTERM
            assert folder is not None
            print(f"struck in step {now}", flush=True)
            # Itself last: the others must still hear of it.
            for rank in reversed(strike.ranks):
                os.kill(int((Path(folder) / f"pid{rank}").read_text()), number)
        output, loss_func = forward_step(data_iterator, model)
        return output, loss_func

    return step


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
