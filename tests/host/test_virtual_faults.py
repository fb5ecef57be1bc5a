"""A rank with several stages of a module that dies, fails or skips a task ends all others."""

import os
import re
import signal
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from megatron_mosaic.schedule.steps import Compute, Step
from megatron_mosaic.schedule.task import Task
from tests.parity.record import ARGUMENTS, OPTIMIZERS
from tests.parity.training import options_of
from tests.ranks import Ended, run_to_the_end

# Vision has two stages on each of ranks 0 and 1, language on each of ranks 1 and 2.
PLAN_PATH = Path(__file__).parent.parent / "plans" / "virtual_uneven_vision.yaml"
LIMITS = ["--mosaic-heartbeat-timeout-s", "10", "--mosaic-task-timeout-s", "5"]
ENDS_WITHIN_S = 90  # of which the start takes half on a busy machine
STEP = 2

KILLED = (1, Task("F", "language", 2, (1,)))
RAISES = (0, Task("B", "vision", 2, (2, 3)))
SKIPS = (2, Task("F", "language", 1, (3,)))


def _train(rank: int, kind: str, struck: int, task: Task) -> None:
    from megatron_mosaic.host.cpu import run_on_cpu

    run_on_cpu()
    from megatron_mosaic.host import forward_backward, training
    from megatron_mosaic.host.arguments import parse_and_validate_args
    from tests.parity import vlm_script

    if rank == struck and kind == "skip":
        steps_of = forward_backward.steps_of
        forward_backward.steps_of = lambda *plan: _without(steps_of(*plan), task)
    elif rank == struck:
        _strike_in(task, kind)
    arguments = [*ARGUMENTS, *OPTIMIZERS["sgd"], *options_of(PLAN_PATH), *LIMITS]
    sys.argv = ["script", *arguments, "--mosaic-plan", str(PLAN_PATH)]
    vlm_script.main(parse_and_validate_args, training.pretrain)


def _without(steps: Sequence[Step], task: Task) -> tuple[Step, ...]:
    """Leaves out a forward task, with what brings and takes its activations."""

    def is_about(step: Step) -> bool:
        if isinstance(step, Compute):
            return step.task == task
        kind, edge, microbatch = step.transfer
        ends = (edge[:2], edge[2:])
        return kind == "activation" and (microbatch,) == task[3] and task[1:3] in ends

    return tuple(step for step in steps if not is_about(step))


def _strike_in(task: Task, kind: str) -> None:
    from megatron.training import get_args

    from megatron_mosaic.host.runner import ModuleRunner

    name = "forward" if task.kind == "F" else "backward"
    run = getattr(ModuleRunner, name)

    def strike(runner, own, received):
        if own == task and get_args().curr_iteration + 1 == STEP:
            if kind == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise KeyError("no such token")
        return run(runner, own, received)

    setattr(ModuleRunner, name, strike)


@pytest.fixture(scope="module")
def ended() -> dict[str, list[Ended]]:
    """How the ranks ended, by what befell one of them; all at once, for they mostly wait."""
    faults = {"kill": KILLED, "raise": RAISES, "skip": SKIPS}

    def run(kind: str) -> list[Ended]:
        return run_to_the_end(_train, 3, kind, *faults[kind], timeout_s=ENDS_WITHIN_S)

    with ThreadPoolExecutor(len(faults)) as pool:
        return dict(zip(faults, pool.map(run, faults), strict=True))


def _lines(ended: list[Ended], *, but: int | None = None) -> list[str]:
    """What the ranks say in their last words, one line of each."""
    assert all(each.status != 0 for each in ended), ended
    found = [
        re.findall(r"^error: run: .*", each.output, re.MULTILINE)
        for rank, each in enumerate(ended)
        if rank != but
    ]
    assert all(found), ended
    return [lines[-1] for lines in found]


def test_killed_rank_is_named_in_the_task_of_its_later_stage(ended):
    for line in _lines(ended["kill"], but=KILLED[0]):
        assert re.search(r"rank=1 must answer .* in F1 language.2 of step 2;", line), line


def test_rank_that_raises_is_named_in_the_task_of_its_later_stage(ended):
    for line in _lines(ended["raise"], but=RAISES[0]):
        assert re.search(r"rank=0 must end B2-3 vision.2 of step 2 .* it had KeyError", line), line


def test_rank_that_skips_a_task_ends_the_run_and_all_name_one_rank(ended):
    lines = _lines(ended["skip"])

    # By its own count it is elsewhere: whoever misses the task may be the one that is named.
    assert re.search(r"rank=[12] must leave \S.* language.\d.* of step 1 within 5 s;", lines[0])
    assert set(lines) == {lines[0]}
