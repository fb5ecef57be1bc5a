"""The cost model's closed form of a plan, beside a simulation with the same stage times."""

import pytest

from megatron_mosaic.cost.cost_model import CostModel
from megatron_mosaic.cost.plan_memory import samples_per_task
from megatron_mosaic.cost.sizes import ParallelSizes
from megatron_mosaic.schedule.graph import Stage
from megatron_mosaic.schedule.plan_program import program_of_plan
from megatron_mosaic.schedule.simulate import PassTimes, simulate
from tests.planner.problems import cluster, encoder, model
from tests.schedule.plans import place, plan_of

LANGUAGE = place("language", *range(4), tp=2, pp=2)


@pytest.mark.parametrize(
    ("kind", "vision", "group"),
    [
        ("1f1b", place("vision", 4, 5, dp=2), None),
        ("1f1b", place("vision", 4, 5, dp=2, trainable=()), None),
        ("colocated", place("vision", 4, 5, dp=2), 4),
        ("colocated", place("vision", 4, 5, dp=2), 1),
        ("colocated", place("vision", *range(4), dp=4), 4),
        ("colocated", place("vision", *range(4), tp=2, dp=2), None),
    ],
)
def test_step_of_a_plan_is_close_to_its_simulation(kind, vision, group):
    plan = plan_of(kind, vision, LANGUAGE, num_microbatches=16, group=group)
    trainable = () if vision.trainable == () else None
    spec = model(encoder("vision", trainable=trainable))
    costs = CostModel(spec, cluster(8))

    breakdown = costs.estimate(plan).breakdown

    tasks_s = {}
    for name, placement in plan.modules.items():
        samples = samples_per_task(plan, name)
        stages = costs.stages(name, ParallelSizes.of(placement), samples_per_task=samples)
        for s, stage in enumerate(stages):
            tasks_s[Stage(name, s)] = PassTimes(stage.forward_s, stage.backward_s)
    program = program_of_plan(plan)
    sizes = ParallelSizes.of(plan.language)
    hop_s = costs.stages("language", sizes, samples_per_task=1)[0].hop_s
    entry_s = costs.entry_s("language", 1)
    transfers_s = {
        edge: hop_s if edge.source == edge.destination else entry_s for edge in program.edges
    }
    timeline = simulate(program, tasks_s=tasks_s, transfers_s=transfers_s)
    once_s = breakdown.sync_s + breakdown.optimizer_s
    assert breakdown.step_s - once_s == pytest.approx(timeline.makespan_s, rel=0.02)
