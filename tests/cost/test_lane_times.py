"""Times of plans whose modules run at the same time."""

from dataclasses import replace

import numpy as np
import pytest

from megatron_mosaic.cost.cost_model import CostModel
from megatron_mosaic.cost.plan_times import union_s
from megatron_mosaic.cost.sizes import TrainingSettings
from megatron_mosaic.errors import PlanError
from megatron_mosaic.layout.plan import Plan, ScheduleKind
from megatron_mosaic.layout.share import Share
from megatron_mosaic.schedule.graph import Stage
from megatron_mosaic.schedule.plan_program import program_of_plan
from megatron_mosaic.schedule.simulate import Pass, Timeline
from tests.planner.problems import cluster, encoder, model
from tests.schedule.plans import place, plan_of

LANGUAGE = place("language", 0)
VISION, FIRST = Stage("vision", 0), Stage("language", 0)
GRAPHS = TrainingSettings(cuda_graph="full")
ONE_GPU = cluster(1)  # an H100, of 132 multiprocessors
SPEC = model(encoder("vision", trainable=None))


def shared_plan(
    sms: int | None,
    *,
    language: int | None = None,
    kind: ScheduleKind = "concurrent",
    num_microbatches: int = 4,
) -> Plan:
    vision = replace(place("vision", 0), share=Share(sms=sms) if sms else None)
    own = replace(LANGUAGE, share=Share(sms=language) if language else None)
    return plan_of(kind, vision, own, num_microbatches=num_microbatches, group=1)


def costs_on(spec=SPEC, **sharing) -> CostModel:
    gpu = ONE_GPU.gpu
    assert gpu.sharing is not None
    changed = replace(gpu, sharing=replace(gpu.sharing, **sharing))
    return CostModel(spec, replace(ONE_GPU, gpu=changed), GRAPHS)


def lanes_of(costs: CostModel, plan: Plan):
    found = costs.plan_durations(plan).lanes
    assert found is not None
    return found


def test_plan_of_modules_in_turn_has_no_lanes():
    assert costs_on().plan_durations(shared_plan(None, kind="colocated")).lanes is None


def test_quota_makes_a_module_as_slow_as_that_part_of_the_gpu():
    costs, plan = costs_on(), shared_plan(32)

    lanes = lanes_of(costs, plan)

    (slower,) = costs.on(sms=32).plan_stages(plan)["vision"]
    assert lanes.shared_s[VISION] == (slower.forward_s, slower.backward_s)
    # No slower than its multiprocessors, 132 / 32 = 4.1: what each operation costs stays.
    tasks_s = costs.plan_durations(plan).tasks_s
    stretch = lanes.shared_s[VISION].forward_s / tasks_s[VISION].forward_s
    assert 1.5 < stretch < 4.1
    assert lanes.shared_s[FIRST] == tasks_s[FIRST]  # without a quota


def test_module_alone_is_not_slowed():
    lanes = lanes_of(costs_on(), shared_plan(32))

    assert lanes.slowdown((Pass(VISION, False),)) == (1.0,)


def test_modules_without_quotas_halve_the_gpu():
    lanes = lanes_of(costs_on(interference=0.0), shared_plan(None))

    slowdown = lanes.slowdown((Pass(VISION, False), Pass(FIRST, False)))
    # Multiplications take twice as long; what memory bounds 1.15 times, half being 0.87 of the
    # knee, or as much longer as both want of the bandwidth.
    assert all(1.15 < it <= 2 for it in slowdown)
    assert sum(1 / it for it in slowdown) < 1.5


def test_modules_with_quotas_slow_each_other_by_memory_alone():
    quiet = lanes_of(costs_on(interference=0.0), shared_plan(32, language=100))
    loud = lanes_of(costs_on(interference=1.0), shared_plan(32, language=100))
    both = (Pass(VISION, True), Pass(FIRST, True))

    assert all(
        1 <= a < b < 2 for a, b in zip(quiet.slowdown(both), loud.slowdown(both), strict=True)
    )


def test_one_thread_launches_for_both():
    # Without CUDA graphs both are as fast as their launches: together half as fast.
    costs = CostModel(SPEC, ONE_GPU)
    lanes = lanes_of(costs, shared_plan(32, language=100))

    slowdown = lanes.slowdown((Pass(VISION, False), Pass(FIRST, False)))
    assert slowdown == pytest.approx((2, 2), rel=0.1)


def test_quota_beyond_the_gpu_is_refused():
    with pytest.raises(PlanError, match=r"modules.vision: share.sms=140 must be <= 132, .* H100"):
        costs_on().estimate(shared_plan(140))


def test_gpu_that_nobody_knows_to_share_is_refused():
    costs = CostModel(SPEC, replace(ONE_GPU, gpu=replace(ONE_GPU.gpu, sharing=None)))

    with pytest.raises(PlanError, match="gpu H100: sharing must be given"):
        costs.estimate(shared_plan(32))


@pytest.mark.parametrize("sms", [None, 8, 32, 64, 124])
@pytest.mark.parametrize("language", [None, 8, 68])
def test_breakdown_adds_up_and_nothing_in_it_is_negative(sms, language):
    found = costs_on().estimate(shared_plan(sms, language=language)).breakdown

    parts = [getattr(found, name) for name in found.__slots__]
    assert all(part >= 0 for part in parts)
    assert found.step_s == pytest.approx(sum(parts))
    assert found.bubble_s < 1e-9 + 0.5 * found.step_s


def test_step_is_between_the_longest_module_and_all_in_turn_slowed():
    costs, plan = costs_on(interference=0.0), shared_plan(64, language=68)

    tasks_s = costs.plan_durations(plan).tasks_s
    found = costs.estimate(plan).breakdown

    busy_s = found.compute_s + found.communication_s + found.imbalance_s + found.bubble_s
    assert 4 * max(map(sum, tasks_s.values())) < busy_s
    shared_s = lanes_of(costs, plan).shared_s
    assert busy_s < 4 * sum(map(sum, shared_s.values()))


def test_small_encoder_beside_a_large_model_gains_over_a_long_step():
    # An encoder of 8 tokens takes a tenth of the language model's time. On 8 multiprocessors it
    # takes seven tenths, beside a language model that is 5 % slower without them. It waits for
    # nobody but at the step's ends, which count less the longer the step is.
    small = model(encoder("vision", trainable=None, tokens=8))
    costs = costs_on(small, bandwidth_knee=0.05, interference=0.0)

    def gain(number: int) -> float:
        in_turn = shared_plan(None, kind="colocated", num_microbatches=number)
        together = shared_plan(8, language=124, num_microbatches=number)
        return costs.estimate(in_turn).step_s / costs.estimate(together).step_s

    assert gain(4) < 1 < gain(32) < 19.0 / 17.9


def test_memory_of_lanes_is_not_shared():
    costs = costs_on()

    def terms(kind):
        ((_, found),) = costs.plan_memory(shared_plan(None, kind=kind)).items()
        return found

    together, in_turn = terms("concurrent"), terms("bubble_fill")
    stages = costs.plan_stages(shared_plan(None))
    working = [own.memory.working for (own,) in stages.values()]
    assert together["working"] == sum(working)
    assert in_turn["working"] == max(working)
    assert together["activations"] >= in_turn["activations"]
    assert together["weights"] == in_turn["weights"]


def test_rank_works_while_any_module_does():
    program = program_of_plan(shared_plan(None))
    num_tasks = len(program.tasks.stage)
    # Two tasks that overlap, one inside them, then a pause of 2 until all others: 4 + 1.
    start_s, end_s = np.full(num_tasks, 6.0), np.full(num_tasks, 7.0)
    start_s[:3], end_s[:3] = (1.0, 0.0, 0.5), (4.0, 3.0, 2.0)
    timeline = Timeline(program=program, start_s=start_s, end_s=end_s)

    assert union_s(timeline, program.kinds[0]) == 4.0 + 1.0
