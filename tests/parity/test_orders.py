"""Ranks of different language stages may run their encoder replicas at different moments."""

import importlib
from pathlib import Path
from unittest.mock import patch

import pytest

from megatron_mosaic.comm.replay import replay
from megatron_mosaic.layout.plan import Plan
from megatron_mosaic.schedule.build import build_schedule
from megatron_mosaic.schedule.schedule import Schedule
from megatron_mosaic.schedule.verify import verify
from tests.parity.record import OPTIMIZERS, record_plan
from tests.parity.training import TIMEOUT_S, compared
from tests.ranks import run_ranks

PLANS = Path(__file__).parent.parent / "plans"
BUILT_BY = (
    "engine.lost",
    "host.data.provider",
    "host.faults.watch",
    "host.forward_backward",
    "host.meeting",
)
# Buckets are linked then: before one leaves, Megatron waits for the one that left before it.
LINKED = ("--ddp-bucket-size", "4000", "--ddp-reduce-scatter-with-fp32-accumulation")
OVERLAP = ("--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather")


def _apart(plan: Plan, **options) -> Schedule:
    """Replicas without a rank of the first language stage encode before all else.

    Those on that stage alone run their backward passes at the end of the step. The others have
    them where the colocated schedule does: they post the gradients just before they wait.
    """
    common = build_schedule(plan, **options)
    tasks = list(common.tasks)
    first = set(plan.language.stage_ranks(0))
    for ranks in plan.modules["vision"].task_groups():
        for rank in ranks:
            own = tasks[rank]
            early = [t for t in own if first.isdisjoint(ranks) and t[:2] == ("F", "vision")]
            late = [t for t in own if first.issuperset(ranks) and t[:2] == ("B", "vision")]
            rest = [t for t in own if t not in early and t not in late]
            tasks[rank] = (*early, *rest, *late)
    return Schedule(
        num_microbatches=common.num_microbatches,
        forward_only=common.forward_only,
        tasks=tuple(tasks),
    )


def _all_live(plan, stage, *, num_microbatches):
    """These orders hold more than their kind promises."""
    return num_microbatches


def _train(rank, plan_path, options):
    from megatron_mosaic.host.cpu import run_on_cpu

    run_on_cpu()
    for name in BUILT_BY:
        module = importlib.import_module(f"megatron_mosaic.{name}")
        module.build_schedule = _apart
    verification = importlib.import_module("megatron_mosaic.schedule.verify")
    verification.max_live = _all_live
    return record_plan(rank, plan_path, options)


@pytest.mark.parametrize(
    ("name", "optimizer", "options"),
    [
        ("colocated_v2_l2pp2", "sgd", ("--images", "ragged")),
        ("colocated_v2_l2pp2", "adam", ("--images", "ragged", *OVERLAP)),
        ("colocated_v2_l2pp2", "adam", ("--images", "sparse", *OVERLAP, *LINKED)),
        ("colocated_vtp2dp2_lpp4", "adam", ("--images", "sparse", *OVERLAP)),
    ],
)
def test_encoder_replicas_that_run_at_different_moments_train_alike(name, optimizer, options):
    path = PLANS / f"{name}.yaml"
    plan = Plan.load(path)
    with patch("megatron_mosaic.schedule.verify.max_live", _all_live):
        verify(plan, _apart(plan))
    assert _apart(plan).tasks != build_schedule(plan).tasks
    arguments = [*OPTIMIZERS[optimizer], *options]

    records = run_ranks(
        _train, plan.world_size, str(path), arguments, init=False, timeout_s=TIMEOUT_S
    )

    result = compared(records, path, optimizer, options)
    assert not result.failures, "\n".join(result.failures[:20])
    replay({rank: record.communication for rank, record in enumerate(records)})
