"""What a run writes down of itself is whole: every task of every rank, in order, step by step."""

from itertools import pairwise
from pathlib import Path

import pytest

from megatron_mosaic.layout.plan import Plan
from megatron_mosaic.schedule.ahead import Part, steps_of_part
from megatron_mosaic.schedule.build import build_schedule
from megatron_mosaic.schedule.measured import read_trace
from megatron_mosaic.schedule.steps import Compute, steps_of
from tests.parity.record import OPTIMIZERS, record_plan
from tests.parity.training import TIMEOUT_S, options_of, script_of
from tests.ranks import run_ranks

PLANS = Path(__file__).parent.parent / "plans"
# Of four steps the first one encodes for two, the last one for none.
PARTS = (Part.BEGINS, Part(0), Part(0), Part.ENDS)


def _train(rank, plan, options, script):
    record_plan(rank, plan, options, (), script)


@pytest.mark.parametrize(
    "name", ["fill_virtual", "ahead_frozen_vision", "virtual_output", "concurrent_shares"]
)
def test_trace_holds_every_task_of_every_training_step(name, tmp_path):
    path = PLANS / f"{name}.yaml"
    plan = Plan.load(path)
    schedule = build_schedule(plan)
    options = [*OPTIMIZERS["sgd"], *options_of(path), "--mosaic-trace", str(tmp_path)]
    if "--use-distributed-optimizer" in options:
        options += OPTIMIZERS["adam"]

    run_ranks(
        _train,
        plan.world_size,
        *(str(path), options, script_of(path)),
        init=False,
        timeout_s=TIMEOUT_S,
    )

    steps = read_trace(tmp_path)
    assert [step.number for step in steps] == [0, 1, 2, 3]
    for step, part in zip(steps, PARTS, strict=True):
        for rank in range(plan.world_size):
            walked = steps_of_part(steps_of(plan, schedule, rank), schedule, part)
            tasks = [each.task for each in walked if isinstance(each, Compute)]
            spans = step.spans.get(rank, ())
            assert [span.task for span in spans] == tasks
            times_s = [time_s for span in spans for time_s in (span.start_s, span.end_s)]
            assert all(earlier <= later for earlier, later in pairwise(times_s))
