"""Megatron may run a step again to see whether its result repeats: plans repeat it to the bit."""

import numpy as np

from megatron_mosaic.layout.plan import Plan
from tests.parity.compare import whole
from tests.parity.record import OPTIMIZERS, record_plan
from tests.parity.test_ahead import DROPOUT, PLANS
from tests.parity.training import TIMEOUT_S, options_of
from tests.ranks import run_ranks

PLAN = PLANS / "virtual_uneven_vision_ahead.yaml"


def _train(rank, plan, options, again):
    """Trains; Megatron doubts the results of the steps ``again``, counted from 1."""
    from megatron_mosaic.host.cpu import run_on_cpu

    run_on_cpu()
    from megatron.core.rerun_state_machine import RerunState, RerunStateMachine

    decide = RerunStateMachine.should_run_forward_backward

    def doubting(machine, data_iterator):
        if machine.state == RerunState.INITIAL_RUN and machine.current_iteration in again:
            machine.rerun_requested = True
        if machine.state == RerunState.RERUNNING_IN_PLACE:
            machine.continue_requested = True
        return decide(machine, data_iterator)

    RerunStateMachine.should_run_forward_backward = doubting
    return record_plan(rank, plan, options)


def _run(path, *again):
    arguments = [*OPTIMIZERS["adam"], *options_of(path), "--use-distributed-optimizer", *DROPOUT]
    records = run_ranks(
        _train,
        Plan.load(path).world_size,
        *(str(path), arguments, again),
        init=False,
        timeout_s=TIMEOUT_S,
    )
    return whole(records)


def test_step_that_runs_again_repeats_to_the_bit():
    once = _run(PLAN)

    # The rows of a step are there when it begins, but not when it begins once more.
    twice = _run(PLAN, 2, 3)

    assert twice.losses[1:3] == [once.losses[1]] * 2
    assert twice.losses[3:5] == [once.losses[2]] * 2
    for name, weight in once.weights[-1].items():
        np.testing.assert_array_equal(twice.weights[-1][name], weight, name)
