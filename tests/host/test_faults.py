"""A rank that dies, fails or hangs ends all others, which say its number and its task."""

import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from itertools import count
from pathlib import Path

import pytest

from megatron_mosaic.layout.plan import Plan
from megatron_mosaic.schedule.build import build_schedule
from megatron_mosaic.schedule.task import Task
from tests.parity.record import ARGUMENTS, OPTIMIZERS
from tests.ranks import ROOT, Ended, run_to_the_end

# Vision has TP 2 on ranks 0 and 2, language has PP 2 on ranks 1 and 2.
PLAN_PATH = Path(__file__).parent.parent / "plans" / "partial_interleaved.yaml"
PLAN = Plan.load(PLAN_PATH)
NUM_STEPS = 4
OPTIONS = ["--images", "one", "--use-distributed-optimizer", *OPTIMIZERS["adam"]]
# Forks on a busy machine are slow to beat; the default is 30 s.
HEARTBEAT = ["--mosaic-heartbeat-timeout-s", "10"]
ENDS_WITHIN_S = 60


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What befalls one rank in one task of one step."""

    kind: str  # kill, raise, hang, slow
    rank: int
    step: int  # from 1
    task: Task

    def strike(self) -> None:
        print(f"struck at {time.monotonic()}", flush=True)
        match self.kind:
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "raise":
                raise KeyError("no such token")
            case "hang":
                threading.Event().wait()
            case "slow":
                time.sleep(4.0)


def _moments(kind: str) -> list[Fault]:
    """Five moments: on every rank, forward and backward, in any step."""
    chance = random.Random(f"mosaic {kind}")
    schedule = build_schedule(PLAN)
    faults = []
    for number, rank in enumerate((0, 2, 1, chance.randrange(3), chance.randrange(3))):
        tasks = [task for task in schedule.tasks[rank] if task.kind == "FB"[number % 2]]
        step = chance.randint(1, NUM_STEPS)
        faults.append(Fault(kind=kind, rank=rank, step=step, task=chance.choice(tasks)))
    return faults


def _train(rank: int, options: list[str], fault: Fault | None) -> None:
    """Trains under the plan; the script's forward step is where the fault strikes."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    from megatron_mosaic.host.cpu import run_on_cpu

    run_on_cpu()
    from megatron_mosaic.host import training
    from megatron_mosaic.host.arguments import parse_and_validate_args
    from megatron_mosaic.host.forward_backward import PlanForwardBackward
    from tests.parity import vlm_script

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
    if fault is not None and fault.rank == rank:
        vlm_script.forward_step = _faulty(vlm_script.forward_step, fault)
    sys.argv = ["script", *ARGUMENTS, *OPTIONS, *options, "--mosaic-plan", str(PLAN_PATH)]
    vlm_script.main(parse_and_validate_args, training.pretrain)


def _faulty(forward_step, fault):
    """Strikes in the task: at its beginning, or in backward when the gradient arrives."""
    forward = [t for t in build_schedule(PLAN).tasks[fault.rank] if t.kind == "F"]
    tasks = iter(forward * NUM_STEPS)
    steps = iter([step + 1 for step in range(NUM_STEPS) for _ in forward])

    def step(data_iterator, model):
        if not model.training:
            return forward_step(data_iterator, model)
        task, now = next(tasks), next(steps)
        here = (now, task._replace(kind=fault.task.kind)) == (fault.step, fault.task)
        if here and fault.task.kind == "F":
            fault.strike()
        output, loss_func = forward_step(data_iterator, model)
        if here and fault.task.kind == "B":
            output.register_hook(lambda gradient: fault.strike())
        return output, loss_func

    return step


def _run(options: list[str], fault: Fault | None = None) -> list[Ended]:
    return run_to_the_end(_train, PLAN.world_size, options, fault, timeout_s=150)


def _losses(ended: list[Ended]) -> dict[int, str]:
    """Losses of the whole batch as printed, by step; they are the same on every rank."""
    return {int(step): loss for step, loss in re.findall(r"losses (\d+) (.*)", ended[0].output)}


def _check(fault: Fault, ended: list[Ended], pattern: str) -> None:
    where = f"{fault.task} of step {fault.step}"
    line = re.compile(f"^error: run: rank={fault.rank} must {pattern}", re.MULTILINE)
    for rank, end in enumerate(ended):
        assert end.status != 0, (fault, rank, end.output)
        if rank != fault.rank:
            said = line.search(end.output)
            assert said is not None, (fault, rank, end.output)
            assert where in said[0], (fault, rank, said[0])
            assert "; look at its output" in said.string[said.start() :]
            assert re.search(f"^run: rank={rank} was in ", end.output, re.MULTILINE), end


def _strike_all(kind: str, options: list[str], pattern: str, folder: Path) -> None:
    """Runs five faults at once: the ranks mostly wait. Resumes the one that came furthest."""
    faults = _moments(kind)
    furthest = max(faults, key=lambda fault: fault.step)
    saving = ["--save", str(folder), "--save-interval", "1"]

    def run(fault: Fault) -> list[Ended]:
        return _run([*options, *(saving if fault is furthest else ())], fault)

    with ThreadPoolExecutor(len(faults)) as pool:
        for fault, ended in zip(faults, pool.map(run, faults), strict=True):
            _check(fault, ended, pattern)
    _check_resumes(furthest, folder)


def _check_resumes(fault: Fault, folder: Path) -> None:
    assert (folder / "latest_checkpointed_iteration.txt").read_text() == str(fault.step - 1)
    resumed = _run([*HEARTBEAT, "--load", str(folder)])

    assert [end.status for end in resumed] == [0] * PLAN.world_size, resumed
    expected = {step: loss for step, loss in _uninterrupted().items() if step >= fault.step}
    assert _losses(resumed) == expected


@cache
def _uninterrupted() -> dict[int, str]:
    losses = _losses(_run(HEARTBEAT))
    assert list(losses) == [1, 2, 3, 4]
    return losses


def test_killed_rank_ends_all_others_which_name_it(tmp_path):
    _strike_all("kill", HEARTBEAT, r"answer within [\d.]+ s, it was last in .*", tmp_path)


def test_rank_that_raises_ends_all_others_which_name_it(tmp_path):
    pattern = r"end .* without an error, it had KeyError: 'no such token'.*"
    _strike_all("raise", HEARTBEAT, pattern, tmp_path)


def test_rank_that_hangs_ends_all_others_which_name_it(tmp_path):
    options = [*HEARTBEAT, "--mosaic-task-timeout-s", "5"]
    _strike_all("hang", options, r"leave .* within \S+ s; .*", tmp_path)


SCRIPT = """
from tests.host import test_faults as faults
if __name__ == "__main__":
    from megatron.training import pretrain
    from megatron.training.arguments import parse_and_validate_args
    from tests.parity import vlm_script
    if int(os.environ["RANK"]) == fault.rank:
        vlm_script.forward_step = faults._faulty(vlm_script.forward_step, fault)
    vlm_script.main(parse_and_validate_args, pretrain)
"""


@pytest.mark.parametrize("kind", ["kill", "hang"])
def test_launched_ranks_say_which_of_them_is_lost(tmp_path, kind):
    task = Task("F", "vision", 0, (2, 3))
    fault = Fault(kind=kind, rank=2, step=2, task=task)
    script = tmp_path / "script.py"
    script.write_text(
        f"import os\nfrom tests.host.test_faults import Fault, Task\nfault = {fault!r}\n{SCRIPT}"
    )
    # torchrun ends the others as soon as one has died, and still they say why.
    options = [*OPTIONS, *HEARTBEAT, "--mosaic-task-timeout-s", "5"]
    done = subprocess.run(
        [
            *(sys.executable, "-m", "megatron_mosaic.run", "--mosaic-device", "cpu", str(script)),
            *(*ARGUMENTS, *options, "--mosaic-plan", str(PLAN_PATH)),
        ],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        cwd=ROOT,
        env={key: value for key, value in os.environ.items() if key != "RANK"}
        | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )

    assert done.returncode != 0
    lines = re.findall(r"error: run: rank=2 must .*", done.stderr)
    assert len(lines) >= PLAN.world_size - 1, done.stderr
    assert all(f"{task} of step 2" in line for line in lines), lines


def test_slow_rank_is_not_lost():
    # Longer than the limit, but the first step showed how long tasks take.
    options = [*HEARTBEAT, "--mosaic-task-timeout-s", "8"]
    fault = Fault(kind="slow", rank=2, step=3, task=Task("B", "language", 1, (1,)))

    ended = _run(options, fault)

    assert [end.status for end in ended] == [0, 0, 0], ended
    assert "struck" in ended[2].output
    assert _losses(ended) == _uninterrupted()


AHEAD_PATH = PLAN_PATH.with_name("ahead_disjoint_sparse.yaml")


def _train_ahead(rank: int) -> None:
    """Rank 0, which encodes alone, dies in its fifth task."""
    from megatron_mosaic.host.cpu import run_on_cpu

    run_on_cpu()
    from megatron_mosaic.host import training
    from megatron_mosaic.host.arguments import parse_and_validate_args
    from tests.parity import vlm_script

    forward_step, number = vlm_script.forward_step, count(1)

    def step(data_iterator, model):
        if rank == 0 and model.training and next(number) == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return forward_step(data_iterator, model)

    vlm_script.forward_step = step
    frozen = ["--freeze-ViT", "--freeze-projection"]
    plan = ["--mosaic-plan", str(AHEAD_PATH)]
    sys.argv = ["script", *ARGUMENTS, *OPTIONS, *HEARTBEAT, *frozen, *plan]
    vlm_script.main(parse_and_validate_args, training.pretrain)


def test_task_of_a_lost_rank_is_named_as_of_the_next_step_where_it_runs_ahead():
    ended = run_to_the_end(_train_ahead, 4, timeout_s=150)

    # Two tasks a step: those of step 1, and in step 1 those of step 2.
    for end in ended[1:]:
        assert end.status != 0
        assert "run: rank=0 must answer" in end.output
        assert "F0-1 vision.0 of step 3, ahead in step 2" in end.output
