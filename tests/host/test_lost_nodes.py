"""A run that loses ranks goes on with those that are left, under a plan made for them."""

import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from megatron_mosaic.cli import main
from tests.host.striking import Strike, errors_of, losses_of, run

MODEL = Path(__file__).parent.parent / "parity" / "planned" / "model.yaml"
IMAGES = ["--images", "one"]


def _plan(path: Path, *asked: str) -> Path:
    assert main(["plan", *asked, "--time-limit", "1", "-o", str(path)]) == 0
    return path


def test_run_that_loses_two_of_four_ranks_goes_on_under_the_plan_for_two(tmp_path, capsys):
    chance = random.Random("lost nodes")
    pins = (
        "--set=micro_batch_size=2",
        "--set=placement=colocated",
        "--set=language.tensor_model_parallel_size=2",
    )
    whole = (str(MODEL), "h100", "--gpus=4", "--global-batch-size=16", *pins)
    four = _plan(tmp_path / "four.yaml", *whole)
    two = _plan(tmp_path / "two.yaml", "--from", str(four), "--gpus", "2")
    assert "4 GPUs become 2.\nA step has 16 samples as before." in capsys.readouterr().out
    strikes = [Strike.at_random(chance, "kill", chance.sample(range(4), 2)) for _ in range(3)]

    def lose(number: int) -> None:
        saved, strike = tmp_path / f"saved{number}", strikes[number]
        saving = ("--save", str(saved), "--save-interval", "1")
        ended = run(four, *IMAGES, *saving, world_size=4, strike=strike, folder=tmp_path / "pids")
        for rank, lines in enumerate(errors_of(ended)):
            if rank not in strike.ranks:
                assert len(lines) == 1
                assert any(f"rank={lost}" in lines[0] for lost in strike.ranks), lines
        assert (saved / "latest_checkpointed_iteration.txt").read_text() == str(strike.step - 1)

    def resume(number: int) -> None:
        ended = run(two, *IMAGES, "--load", str(tmp_path / f"saved{number}"), world_size=2)
        assert [end.status for end in ended] == [0, 0], ended
        losses = losses_of(ended)
        assert list(losses) == list(range(strikes[number].step, 5))
        for step, loss in losses.items():
            np.testing.assert_allclose(loss, uninterrupted[step], rtol=1e-5)

    uninterrupted = losses_of(run(four, *IMAGES, world_size=4))
    for number in range(3):
        lose(number)
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(resume, range(3)))
