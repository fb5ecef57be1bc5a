"""A run that loses ranks goes on with those that are left, under a plan made for them."""

import os
import random
import re
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch.distributed as dist

from megatron_mosaic.cli import main
from tests.host.striking import HEARTBEAT, OPTIONS, Strike, errors_of, losses_of, run
from tests.parity.record import ARGUMENTS
from tests.ranks import ROOT

MODEL = ROOT / "tests" / "parity" / "planned" / "model.yaml"
IMAGES = ("--images", "one")
# As the script's arguments, which a launch by the elastic agent gives again.
MICRO_BATCH = "--set=micro_batch_size=2"
# In the environment of all processes of an elastic launch, with the test's own folder.
MARK = "MOSAIC_TEST_FOLDER"


def _plans(folder: Path, capsys: pytest.CaptureFixture) -> tuple[Path, Path]:
    """A plan for four ranks, and the one for two that it is replanned to."""
    four, two = folder / "plan-4.yaml", folder / "plan-2.yaml"
    pins = ("--set=placement=colocated", "--set=language.tensor_model_parallel_size=2")
    asked = (str(MODEL), "h100", "--gpus=4", "--global-batch-size=16", *pins)
    assert main(["plan", *asked, MICRO_BATCH, "--time-limit=1", "-o", str(four)]) == 0
    left = ("--from", str(four), "--gpus=2", MICRO_BATCH)
    assert main(["plan", *left, "--time-limit=1", "-o", str(two)]) == 0
    assert "4 GPUs become 2.\nA step has 16 samples as before." in capsys.readouterr().out
    return four, two


def _check_losses(losses: dict, uninterrupted: dict, *, first: int) -> None:
    assert list(losses) == list(range(first, 5))
    for step, loss in losses.items():
        np.testing.assert_allclose(loss, uninterrupted[step], rtol=1e-5)


@pytest.mark.parametrize(
    "moment", [0, *(pytest.param(each, marks=pytest.mark.slow) for each in (1, 2))]
)
def test_run_that_loses_two_of_four_ranks_goes_on_under_the_plan_for_two(moment, tmp_path, capsys):
    chance, saved = random.Random(f"lost nodes {moment}"), tmp_path / "saved"
    four, two = _plans(tmp_path, capsys)
    strike = Strike.at_random(chance, "kill", chance.sample(range(4), 2))
    uninterrupted = losses_of(run(four, *IMAGES, world_size=4))

    saving = (*IMAGES, "--save", str(saved), "--save-interval", "1")
    ended = run(four, *saving, world_size=4, strike=strike, folder=tmp_path / "pids")
    resumed = run(two, *IMAGES, "--load", str(saved), world_size=2)

    for rank, lines in enumerate(errors_of(ended)):
        if rank not in strike.ranks:
            assert len(lines) == 1, ended
            assert any(f"rank={lost}" in lines[0] for lost in strike.ranks), lines
    assert (saved / "latest_checkpointed_iteration.txt").read_text() == str(strike.step - 1)
    assert [end.status for end in resumed] == [0, 0], resumed
    _check_losses(losses_of(resumed), uninterrupted, first=strike.step)


SCRIPT = """
import os
import signal
from pathlib import Path
from tests.host.striking import print_losses

STEP, FOLDER = {step}, Path({folder!r})


def lose_node():
    \"\"\"Ends the other rank of this node, the agent that started it, and this rank.\"\"\"
    for pid in (int(file.name) for file in FOLDER.iterdir()):
        if pid != os.getpid():
            os.kill(pid, signal.SIGKILL)
    os.kill(os.getppid(), signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    from megatron.training import get_args, pretrain
    from megatron.training.arguments import parse_and_validate_args
    from tests.parity import vlm_script

    print_losses()
    forward_step = vlm_script.forward_step

    def step(data_iterator, model):
        if os.environ["LOCAL_RANK"] == "0" and get_args().curr_iteration + 1 == STEP:
            lose_node()
        return forward_step(data_iterator, model)

    if os.environ["NODE"] == "lost":
        (FOLDER / str(os.getpid())).touch()
        vlm_script.forward_step = step
    vlm_script.main(parse_and_validate_args, pretrain)
"""


def _agent(node: str, port: int, script: Path, folder: Path) -> subprocess.Popen:
    """Starts the agent of a node, whose ranks write to ``<node>.log``.

    Not to a pipe: Megatron's writers of checkpoints outlive ranks that are killed and hold it open.
    """
    launch = ("--nnodes", "1:2", "--nproc-per-node", "2", "--max-restarts", "2")
    meet = ("--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "run")
    # How long to wait for more nodes, and how soon one is given up.
    waits = ("--rdzv-conf", "last_call_timeout=15,keep_alive_interval=1,keep_alive_max_attempt=3")
    ours = ("-m", "megatron_mosaic.run", "--mosaic-device", "cpu", str(script))
    plan = ("--mosaic-plan", str(folder / "plan-{world_size}.yaml"))
    saving = ("--save", str(folder / "saved"), "--load", str(folder / "saved"))
    with (folder / f"{node}.log").open("w") as log:
        return subprocess.Popen(
            [
                *(
                    sys.executable,
                    "-m",
                    "torch.distributed.run",
                    *launch,
                    *meet,
                    *waits,
                    *ours,
                    *ARGUMENTS,
                ),
                *(*OPTIONS, *HEARTBEAT, *IMAGES, *saving, "--save-interval", "1", *plan),
            ],
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env=os.environ
            | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "NODE": node, MARK: str(folder)},
        )


def _end_writers(folder: Path) -> None:
    """Ends what killed ranks have left: processes that were started for this test alone."""
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get(MARK) == str(folder):
                process.kill()


@pytest.mark.slow
def test_elastic_launch_that_loses_a_node_goes_on_with_the_plan_for_the_other(tmp_path, capsys):
    four, _ = _plans(tmp_path, capsys)
    step, folder = random.Random("elastic").randint(2, 3), tmp_path / "pids"
    folder.mkdir()
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(step=step, folder=str(folder)))
    port = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False).port

    kept = _agent("kept", port, script, tmp_path)
    time.sleep(5)  # whoever comes first serves the agents' own store
    lost = _agent("lost", port, script, tmp_path)
    try:
        kept.wait(timeout=240)
        lost.wait(timeout=30)
    finally:
        kept.kill()
        lost.kill()
        _end_writers(tmp_path)
        said = (tmp_path / "kept.log").read_text()

    assert kept.returncode == 0, said
    assert lost.returncode == -9
    found = re.findall(r"losses (\d+) \[([^]]*)\]", said)  # ranks may share a line
    losses = {int(each): [float(value) for value in values.split(",")] for each, values in found}
    _check_losses(losses, losses_of(run(four, *IMAGES, world_size=4)), first=1)
    assert "error: run: rank=" in said
