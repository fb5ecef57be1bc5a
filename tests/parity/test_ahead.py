"""Frozen encoders that run one step ahead: when they do, and where a run begins and ends anew."""

import tempfile
from collections import Counter
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from megatron_mosaic.layout.plan import Plan
from tests.parity.compare import whole
from tests.parity.record import OPTIMIZERS, record_plan
from tests.parity.training import TIMEOUT_S, options_of
from tests.ranks import run_ranks

PLANS = Path(__file__).parent.parent / "plans"
DROPOUT = ("--attention-dropout", "0.1", "--hidden-dropout", "0.1")
SAVED_STEP = 2


def _train(rank, plan, options):
    """Trains, and counts the forward tasks of vision in each step, and those of evaluation."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    from megatron_mosaic.host.cpu import run_on_cpu

    run_on_cpu()
    from megatron.training import get_args

    from megatron_mosaic.host.runner import ModuleRunner

    # Megatron's own way out of starting a fresh interpreter for each rank's writer.
    filesystem_async.get_write_results_queue(mp_mode="fork")
    counts: Counter[str | int] = Counter()
    forward = ModuleRunner.forward

    def counted(self, task, received):
        if task.module == "vision":
            work = self._current_work()
            counts["evaluation" if work.forward_only else get_args().curr_iteration + 1] += 1
        return forward(self, task, received)

    ModuleRunner.forward = counted
    record = None
    with suppress(SystemExit):  # with --exit-interval Megatron ends the process
        record = record_plan(rank, plan, options)
    return record, dict(counts)


def _run(path, *options):
    arguments = [*OPTIMIZERS["adam"], *options_of(path), "--use-distributed-optimizer", *options]
    world_size = Plan.load(path).world_size
    outcomes = run_ranks(_train, world_size, str(path), arguments, init=False, timeout_s=TIMEOUT_S)
    records, counts = zip(*outcomes, strict=True)
    return None if None in records else whole(records), counts[0]


def _without(path, folder):
    """The same plan with every encoder in its own step."""
    text = path.read_text()
    assert ", ahead: true" in text
    other = Path(folder) / "in_step.yaml"
    other.write_text(text.replace(", ahead: true", ""))
    return other


def _assert_same(own, other):
    for name, values in other.items():
        np.testing.assert_array_equal(own[name], values, name)


@pytest.fixture(scope="module")
def through():
    """A run with dropout that saves on the way, and the folder of its checkpoints."""
    folder = tempfile.mkdtemp(prefix="mosaic-ahead-")
    saving = ("--save", folder, "--save-interval", str(SAVED_STEP))
    return *_run(PLANS / "ahead_frozen_vision.yaml", *DROPOUT, *saving), folder


def test_encoder_runs_twice_in_the_first_step_and_not_in_the_last(through):
    _, counts, _ = through

    # Eight microbatches in groups of two: four tasks a step, in each of three evaluations too.
    evaluations = counts.pop("evaluation")
    assert evaluations % 4 == 0
    assert counts == {1: 8, 2: 4, 3: 4}


def test_dropout_of_an_encoder_is_the_same_whenever_it_runs(through, tmp_path):
    run, _, _ = through

    in_step, counts = _run(_without(PLANS / "ahead_frozen_vision.yaml", tmp_path), *DROPOUT)

    assert counts[4] == 4
    _assert_same(run.weights[-1], in_step.weights[-1])


def test_resumed_run_makes_the_rows_of_its_first_step_anew(through):
    run, _, folder = through
    resuming = ("--load", folder, "--ckpt-step", str(SAVED_STEP))

    resumed, counts = _run(PLANS / "ahead_frozen_vision.yaml", *DROPOUT, *resuming)

    assert (counts[3], counts.get(4, 0)) == (8, 0)
    assert resumed.losses == run.losses[SAVED_STEP:]
    _assert_same(resumed.weights[-1], run.weights[-1])


def test_run_that_stops_early_makes_nothing_for_later(tmp_path):
    _, counts = _run(PLANS / "ahead_vision_stages.yaml", "--exit-interval", "2")

    # One microbatch in a task. Nothing but the step before the last one looks ahead.
    counts.pop("evaluation", None)
    assert counts == {1: 16}
