"""What befalls long runs: they end alike on all ranks, name the cause, and lose nothing saved."""

import random
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_mosaic.layout.plan import Plan
from tests.host.striking import NUM_STEPS, Strike, errors_of, losses_of, run
from tests.ranks import Ended

PLANS = Path(__file__).parent.parent / "plans"
# Vision has TP 1 and DP 2, language TP 2, both on ranks 0 and 1.
PLAN = PLANS / "colocated_v2_l2.yaml"
IMAGES = ("--images", "one")
# The default suite injects each fault once; `-m slow` at two more moments.
MOMENTS = [0, *(pytest.param(number, marks=pytest.mark.slow) for number in (1, 2))]


def _chance(fault: str, moment: int) -> random.Random:
    return random.Random(f"{fault} {moment}")


def _saving(folder: Path, *, every: int = 1) -> tuple[str, ...]:
    return ("--save", str(folder / "saved"), "--save-interval", str(every))


def _saved_step(folder: Path) -> int:
    return int((folder / "saved" / "latest_checkpointed_iteration.txt").read_text())


def _check_resumes(plan: Path, folder: Path, *options: str, uninterrupted: list[Ended]) -> None:
    """Goes on from what was saved: the losses are those of the run that nothing befell."""
    first, world_size = _saved_step(folder) + 1, Plan.load(plan).world_size
    resumed = run(plan, *options, "--load", str(folder / "saved"), world_size=world_size)

    assert [end.status for end in resumed] == [0] * world_size, resumed
    losses, expected = losses_of(resumed), losses_of(uninterrupted)
    assert list(losses) == list(range(first, NUM_STEPS + 1))
    for step, loss in losses.items():
        np.testing.assert_allclose(loss, expected[step], rtol=1e-5)


@pytest.mark.parametrize(
    "name",
    [
        "virtual_uneven_vision_ahead",  # bubble_fill, with a frozen encoder one step ahead
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in (
                "colocated_v2_l2",  # no_pipelining
                "disjoint_v1_l2",  # 1f1b
                "virtual_uneven_disjoint",  # interleaved
                "colocated_vtp2_ldp2",  # colocated
                "concurrent_shares",  # concurrent
            )
        ),
    ],
)
def test_run_told_to_end_saves_its_step_and_ends_well_on_all_ranks(name, tmp_path):
    plan = PLANS / f"{name}.yaml"
    world_size = Plan.load(plan).world_size
    chance = _chance(f"sigterm {name}", 0)
    strike = Strike.at_random(chance, "terminate", chance.sample(range(world_size), world_size))
    # Loaders have processes, whom Slurm tells to end as well.
    options = ("--exit-signal-handler", "--num-workers", "1", *_saving(tmp_path, every=100))

    with ThreadPoolExecutor(2) as pool:
        whole = pool.submit(run, plan, world_size=world_size)
        ended = run(plan, *options, world_size=world_size, strike=strike, folder=tmp_path / "pids")

    assert [end.status for end in ended] == [0] * world_size, ended
    assert errors_of(ended) == [[]] * world_size
    assert "exiting program after receiving SIGTERM" in ended[0].output
    assert _saved_step(tmp_path) == strike.step
    _check_resumes(plan, tmp_path, uninterrupted=whole.result())


@pytest.mark.parametrize("moment", MOMENTS)
def test_run_told_to_end_without_saving_ends_as_told_and_blames_no_rank(moment, tmp_path):
    chance = _chance("sigterm", moment)
    strike = Strike.at_random(chance, "terminate", chance.sample(range(2), 2))
    # Ranks wait a few seconds for word of a lost one; this run would be at its end by then.
    strike = replace(strike, then_s=30.0)

    options = (*IMAGES, *_saving(tmp_path))
    ended = run(PLAN, *options, world_size=2, strike=strike, folder=tmp_path / "pids")

    assert [end.status for end in ended] == [143, 143], ended  # 128 + SIGTERM
    assert errors_of(ended) == [[], []]
    assert _saved_step(tmp_path) == strike.step - 1


@pytest.mark.parametrize("moment", MOMENTS)
def test_loss_that_is_not_a_number_ends_all_ranks_which_say_where_it_arose(moment, tmp_path):
    strike = Strike.at_random(_chance("nan", moment), "nan")

    ended = run(PLAN, *IMAGES, *_saving(tmp_path), world_size=2, strike=strike)

    # Megatron runs the step again, saves, and asks to be started on other GPUs: its status 16.
    assert all("exit status 16" in end.output for end in ended), ended
    task = f"F{strike.call // 2} language.0 of step {strike.step}"
    said = rf"Unexpected result nan on rank [01] at .*message='found NaN in the loss, in {task}'"
    assert re.search(said, ended[0].output + ended[1].output), ended
    assert _saved_step(tmp_path) == strike.step - 1
    assert all("nan" not in str(loss) for loss in losses_of(ended)[strike.step - 1])


@pytest.mark.parametrize("moment", MOMENTS)
def test_loss_that_is_not_a_number_is_an_error_where_steps_do_not_run_again(moment, tmp_path):
    if moment == 0:
        pytest.skip("costs a run of ranks; -m slow has it")
    strike = Strike.at_random(_chance("nan", moment), "nan")

    options = (*IMAGES, *_saving(tmp_path), "--rerun-mode", "disabled")
    ended = run(PLAN, *options, world_size=2, strike=strike)

    task = f"F{strike.call // 2} language.0 of step {strike.step}"
    assert re.search(f"found NaN in the loss, in {task}", ended[0].output + ended[1].output), ended
    assert all(end.status != 0 for end in ended)
    assert _saved_step(tmp_path) == strike.step - 1


@pytest.mark.parametrize("moment", MOMENTS)
def test_loader_process_that_dies_ends_all_ranks_which_say_so(moment, tmp_path):
    chance = _chance("worker", moment)
    strike = Strike.at_random(chance, "worker", [chance.randrange(2)])

    options = (*IMAGES, "--num-workers", "1", *_saving(tmp_path))
    ended = run(PLAN, *options, world_size=2, strike=strike)

    assert all(end.status != 0 for end in ended), ended
    lines = [line for own in errors_of(ended) for line in own]
    # torch says it in the middle of a task, or where the batch is missing.
    assert any("DataLoader worker" in line for line in lines), ended
    assert all(
        f"rank={strike.ranks[0]}" in line or f"on rank {strike.ranks[0]}" in line for line in lines
    ), lines
    assert _saved_step(tmp_path) >= strike.step - 1


@pytest.mark.slow
@pytest.mark.parametrize("moment", [0, 1, 2])
def test_sample_that_does_not_decode_ends_all_ranks_or_is_passed_over(moment, tmp_path):
    strike = Strike.at_random(_chance("unreadable", moment), "unreadable")
    workers = ("--num-workers", str(moment % 2))
    allowed = ("--mosaic-max-unreadable-samples", "1")

    with ThreadPoolExecutor(2) as pool:
        options = (*IMAGES, *workers)
        stopped, passed = (
            pool.submit(run, PLAN, *options, *more, world_size=2, strike=strike).result()
            for more in (_saving(tmp_path), allowed)
        )

    assert [end.status for end in passed] == [0, 0]
    (line,) = [line for own in errors_of(stopped) for line in own]
    start = rf"error: data: sample={strike.sample} must be readable on rank [01], not raise OSError"
    assert re.match(start + " 'image file is truncated' at ", line), line
    assert _saved_step(tmp_path) == strike.step - 1
    notes = re.findall(rf"mosaic: sample {strike.sample} is passed over.*", passed[0].output)
    assert notes
    assert losses_of(passed)[1] == losses_of(stopped)[1]
    assert list(losses_of(passed)) == [1, 2, 3, 4]
