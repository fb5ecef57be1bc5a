"""What is walked where training begins and ends, with frozen encoders a step ahead."""

from pathlib import Path

import pytest

from megatron_mosaic.layout.plan import Plan
from megatron_mosaic.schedule.ahead import Part, steps_of_part
from megatron_mosaic.schedule.build import build_schedule
from megatron_mosaic.schedule.rendezvous import blocked_ranks
from megatron_mosaic.schedule.steps import Compute, steps_of

PLANS = sorted((Path(__file__).parent.parent / "plans").glob("ahead_*.yaml"))
PARTS = (Part(0), Part.BEGINS, Part.ENDS, Part.BEGINS | Part.ENDS)


def _steps(plan, part):
    schedule = build_schedule(plan)
    return [
        steps_of_part(steps_of(plan, schedule, rank), schedule, part)
        for rank in range(plan.world_size)
    ]


def _shown(steps):
    tasks = [str(step.task) for step in steps if isinstance(step, Compute)]
    return " ".join(task for task in tasks if "vision" in task)


def test_encoder_runs_for_this_step_and_the_next_where_training_begins():
    plan = Plan.load(PLANS[0].with_name("ahead_disjoint_sparse.yaml"))
    once = "F0-1 vision.0 F2-3 vision.0"

    # Four microbatches, two in a task; vision is all that rank 0 hosts.
    shown = [_shown(_steps(plan, part)[0]) for part in PARTS]

    assert shown == [once, f"{once} {once}", "", once]


def test_language_model_runs_the_same_in_every_part():
    plan = Plan.load(PLANS[0].with_name("ahead_vision_stages.yaml"))

    # Rank 2 hosts the last stage of language alone.
    assert len({_steps(plan, part)[2] for part in PARTS}) == 1


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.stem)
@pytest.mark.parametrize("part", [Part.ENDS, Part(0)], ids=["ends", "between"])
def test_no_rank_waits_for_ever_in_any_part(path, part):
    plan = Plan.load(path)

    assert blocked_ranks(plan, _steps(plan, part)) == ()


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.stem)
def test_no_rank_waits_for_ever_in_the_prologue(path):
    plan = Plan.load(path)
    # The prologue is what comes before the steps of a step that is prepared.
    prologue = [
        both[: len(both) - len(rest)]
        for both, rest in zip(_steps(plan, Part.BEGINS), _steps(plan, Part(0)), strict=True)
    ]

    assert any(prologue)
    assert blocked_ranks(plan, prologue) == ()
