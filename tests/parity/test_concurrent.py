"""Modules that run at the same time train to the bit as the same modules one after the other."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest

from megatron_mosaic.comm.replay import Issue, replay
from tests.parity.compare import Whole, whole
from tests.parity.concurrent import Run, concurrent, in_another_order, serial, train
from tests.parity.record import OPTIMIZERS
from tests.parity.training import options_of, script_of

PLANS = Path(__file__).parent.parent / "plans"
ONE_RANK = """
format: 1
world_size: 1
global_batch_size: {samples}
micro_batch_size: 2
modules:
  vision: {{ranks: 0{vision}}}
  language: {{ranks: 0{language}}}
edges: [[vision, language]]
schedule: {{kind: concurrent, encoder_group: {group}}}
"""
RAGGED = ("--images", "ragged")
FROZEN = (*RAGGED, "--freeze-ViT", "--freeze-projection")


SHORT = ("--train-iters", "2", "--eval-iters", "1", "--eval-interval", "2")
THREE_MODULES = """
format: 1
world_size: 1
global_batch_size: 16
micro_batch_size: 2
modules:
  vision: {ranks: 0}
  audio: {ranks: 0}
  language: {ranks: 0, virtual_pipeline_model_parallel_size: 2}
edges: [[vision, language], [audio, language]]
schedule: {kind: concurrent, encoder_group: 2}
"""


def _one_rank(samples, group, vision="", language="", options=RAGGED):
    plan = ONE_RANK.format(samples=samples, group=group, vision=vision, language=language)
    return Run(plan, (*OPTIMIZERS["sgd"], *options, *SHORT, "--global-batch-size", str(samples)))


def _of_file(name):
    path = PLANS / f"{name}.yaml"
    options = options_of(path)
    optimizer = "adam" if "--use-distributed-optimizer" in options else "sgd"
    return Run(path.read_text(), (*OPTIMIZERS[optimizer], *options, *SHORT), script_of(path))


RUNS = {
    1: {
        "one microbatch": _one_rank(2, 1),
        "two microbatches": _one_rank(4, 1),
        "eight in groups of two": _one_rank(16, 2),
        "frozen": _one_rank(16, 1, vision=", trainable: []", options=FROZEN),
        "recompute": _one_rank(8, 1, vision=", recompute: full", language=", recompute: selective"),
        "virtual_tied_one_rank": _of_file("virtual_tied_one_rank"),
    },
    2: {
        name: _of_file(name)
        for name in (
            "colocated_sequence_parallel",
            "colocated_sparse_overlap",
            "recompute_both",
            "fill_virtual",
            "virtual_uneven_vision_ahead",
            "vision_cp2_language_cp2",
        )
    },
    4: {
        name: _of_file(name)
        for name in (
            "ahead_frozen_vision",
            "ahead_one_of_two",
            "colocated_vtp2dp2_lpp4",
            "encoders_on_shared_ranks",
            "items_fill_vtp2",
            "output_on_shared_ranks",
        )
    },
}


def _records(world_size):
    """What ranks recorded of each run in lanes, and of the same without."""
    runs = list(RUNS[world_size].values())
    in_lanes = [run._replace(plan=concurrent(run.plan)) for run in runs]
    one_by_one = [run._replace(plan=serial(run.plan)) for run in runs]
    records = train(world_size, [*in_lanes, *one_by_one])
    pairs = zip(records[: len(runs)], records[len(runs) :], strict=True)
    return dict(zip(RUNS[world_size], pairs, strict=True))


def _assert_equal(own: Whole, other: Whole) -> None:
    assert own.losses == other.losses
    assert own.evaluations == other.evaluations
    for tensors in ("gradients", "weights"):
        for step, (ours, theirs) in enumerate(
            zip(getattr(own, tensors), getattr(other, tensors), strict=True)
        ):
            assert set(ours) == set(theirs)
            for name, values in theirs.items():
                np.testing.assert_array_equal(ours[name], values, f"{tensors} {step} {name}")


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_lanes_train_to_the_bit_as_one_module_after_the_other(world_size):
    for name, (in_lanes, one_by_one) in _records(world_size).items():
        _assert_equal(whole(in_lanes), whole(one_by_one))
        for record in in_lanes:
            lanes = {entry.lane for entry in record.communication if isinstance(entry, Issue)}
            assert len(lanes) >= 3, name  # that of the loop, and those of two modules
        replay({rank: record.communication for rank, record in enumerate(in_lanes)})


def test_no_order_of_launches_that_events_allow_changes_a_bit():
    options = (*OPTIMIZERS["sgd"], "--modalities", "vision", "audio", "--train-iters", "1")
    run = Run(THREE_MODULES, (*options, "--eval-iters", "0"), "mimo_script")

    in_order, *others = train(
        1, [run, *[run._replace(around=partial(in_another_order, seed)) for seed in range(20)]]
    )

    issued = [_communication(record) for (record,) in (in_order, *others)]
    assert len(set(issued)) == 21  # as many orders
    for other in others:
        _assert_equal(whole(other), whole(in_order))


def _communication(record):
    return tuple(str(entry) for entry in record.communication)
