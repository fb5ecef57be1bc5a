"""A run that stops, is saved and resumes, under the same plan or another, ends the same."""

import numpy as np
import pytest

from megatron_mosaic.layout.plan import Plan
from tests.parity.compare import whole
from tests.parity.record import OPTIMIZERS, record_plan
from tests.parity.test_parity import PLANS, TIMEOUT_S, options_of
from tests.ranks import run_ranks

PLAN_OF = {plan.stem: plan for plan in PLANS}
SHARDED = ["--use-distributed-optimizer"]


def _train(name: str, folder: str, *options: str):
    plan = PLAN_OF[name]
    images = [option for option in options_of(plan) if option in ("--images", "ragged", "one")]
    arguments = [*OPTIMIZERS["adam"], *images, *options]
    world_size = Plan.load(plan).world_size
    return whole(
        run_ranks(record_plan, world_size, str(plan), arguments, init=False, timeout_s=TIMEOUT_S)
    )


def _distance(own: dict, other: dict) -> float:
    assert set(own) == set(other)
    return max(
        float(np.linalg.norm(own[name] - other[name]) / np.linalg.norm(other[name]))
        for name in other
    )


@pytest.mark.parametrize(
    ("saved_under", "resumed_under", "options"),
    [
        ("colocated_v2_l2", "colocated_v2_l2", SHARDED),
        ("colocated_v2_l2", "colocated_v2_l2", []),
        ("colocated_v2_l2", "colocated_v2_l2pp2", SHARDED),
        ("colocated_v2_l2pp2", "partial_interleaved", SHARDED),
        ("partial_interleaved", "one_rank", SHARDED),
        ("disjoint_v2_lpp2", "colocated_v2_l2", []),
    ],
)
def test_resumed_run_ends_as_the_uninterrupted_one(tmp_path, saved_under, resumed_under, options):
    folder = str(tmp_path / "checkpoints")
    options = [*options, "--images", "ragged"]
    save = ["--save", folder, "--save-interval", "2", "--exit-interval", "2"]

    through = _train(saved_under, folder, *options)
    _train(saved_under, folder, *options, *save)
    resumed = _train(resumed_under, folder, *options, "--load", folder)

    assert len(resumed.losses) == 2
    for own, other in zip(resumed.losses, through.losses[2:], strict=True):
        np.testing.assert_allclose(own["lm loss"], other["lm loss"], rtol=1e-6)
    assert _distance(resumed.weights[-1], through.weights[-1]) <= 1e-5


def test_dropout_continues_where_a_checkpoint_stopped(tmp_path):
    folder = str(tmp_path / "checkpoints")
    dropout = ["--attention-dropout", "0.1", "--hidden-dropout", "0.1", "--images", "ragged"]
    save = ["--save", folder, "--save-interval", "2", "--exit-interval", "2"]

    through = _train("colocated_vtp2_ldp2", folder, *dropout)
    _train("colocated_vtp2_ldp2", folder, *dropout, *save)
    resumed = _train("colocated_vtp2_ldp2", folder, *dropout, "--load", folder)

    for name, weight in through.weights[-1].items():
        np.testing.assert_array_equal(resumed.weights[-1][name], weight, name)
