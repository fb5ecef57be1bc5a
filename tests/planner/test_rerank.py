"""The best layouts under schedules that have no closed form."""

from dataclasses import replace

import pytest

from megatron_mosaic.cli import main
from megatron_mosaic.cost.cost_model import CostModel
from megatron_mosaic.errors import PlanError
from megatron_mosaic.layout.plan import Plan
from megatron_mosaic.planner.explanation import explain
from megatron_mosaic.planner.planner import make_plan
from megatron_mosaic.planner.simulated import simulated
from megatron_mosaic.schedule.build import build_schedule
from megatron_mosaic.schedule.verify import verify
from tests.planner.problems import cluster, encoder, language, model, problem
from tests.schedule.plans import place, plan_of

ENCODER = encoder("vision")
BIG_ENCODER = encoder("vision", hidden=2048, layers=12, trainable=None)
DEEP = {"language.pipeline_model_parallel_size": "4", "micro_batch_size": "1"}


def test_short_step_of_a_deep_pipeline_is_interleaved():
    asked = problem(model(), 4, 8, pins=DEEP)

    answer = make_plan(asked)

    assert answer.choice.candidate.kind == "interleaved"
    # Eight layers on four ranks: two virtual stages of one layer each.
    assert answer.choice.candidate.language.chunks == 2
    assert answer.choice.layers_per_stage["language"] == (1,) * 8
    assert answer.choice.step_s < answer.choice.estimate.step_s
    assert answer.baseline == answer.choice  # stock Megatron interleaves as well


@pytest.mark.parametrize("kind", ["1f1b", "interleaved"])
def test_pinned_schedule_of_a_pipeline_holds(kind):
    answer = make_plan(problem(model(), 4, 8, pins={**DEEP, "schedule.kind": kind}))

    assert {entry.candidate.kind for entry in answer.best} == {kind}


def test_interleaving_that_no_layout_allows_is_refused():
    pins = {"schedule.kind": "interleaved", "language.pipeline_model_parallel_size": "1"}

    with pytest.raises(PlanError, match=r"schedule\.kind=interleaved must be possible"):
        make_plan(problem(model(), 4, 8, pins=pins))


def test_layers_that_do_not_divide_are_not_interleaved():
    asked = problem(model(language=language(layers=9)), 4, 8, pins=DEEP)

    assert make_plan(asked).choice.candidate.kind == "1f1b"


def test_waits_of_a_pipeline_are_filled_with_encoder_tasks():
    pins = {**DEEP, "placement": "colocated", "schedule.encoder_group": "4"}
    asked = problem(model(BIG_ENCODER), 4, 8, pins=pins)
    paused = make_plan(replace(asked, pins=replace(asked.pins, kind="colocated")))

    answer = make_plan(asked)

    plan = Plan.loads(answer.plan().to_yaml(), where="plan.yaml")
    assert plan.schedule.kind == "bubble_fill"
    assert plan.schedule.order is not None
    verify(plan, build_schedule(plan))
    assert answer.choice.step_s < paused.choice.step_s
    assert answer.choice.step.peak_bytes <= asked.memory_bytes


@pytest.mark.parametrize(
    ("num_gpus", "placement", "words"),
    [
        (4, "colocated", "with encoder tasks in the waits of its pipeline and"),
        (6, "disjoint", "with"),
    ],
)
def test_frozen_encoders_a_step_ahead_win_where_language_waits_for_them(num_gpus, placement, words):
    frozen = encoder("vision", trainable=())
    # With its layers in one piece; chunks have a test of their own.
    pins = {**DEEP, "placement": placement, "vision.layers_per_stage": "[6]"}
    asked = problem(model(frozen), num_gpus, 8, pins=pins)

    answer = make_plan(asked)

    plan = Plan.loads(answer.plan().to_yaml(), where="plan.yaml")
    assert plan.schedule.ahead
    verify(plan, build_schedule(plan))
    in_step = simulated(answer.choice.estimate, asked, answer.cost_model)
    assert answer.choice.step_s < in_step.step_s
    assert answer.choice.step.peak_bytes <= asked.memory_bytes
    sentence = explain(answer).sentences[0]
    assert sentence.startswith(f"The {placement} layout {words} frozen encoders a step ahead takes")


def test_encoders_in_layer_chunks_win_where_waits_are_short():
    pins = {**DEEP, "placement": "colocated", "schedule.encoder_group": "2"}
    pins["vision.tensor_model_parallel_size"] = "1"
    spec = model(encoder("vision", tokens=2048, trainable=None))
    whole = make_plan(problem(spec, 4, 8, pins={**pins, "vision.layers_per_stage": "[6]"}))

    answer = make_plan(problem(spec, 4, 8, pins=pins))

    plan = Plan.loads(answer.plan().to_yaml(), where="plan.yaml")
    vision = plan.modules["vision"]
    assert vision.pipeline_model_parallel_size == 1
    assert vision.virtual_pipeline_model_parallel_size == 2
    verify(plan, build_schedule(plan))
    assert whole.choice.plan.modules["vision"].virtual_pipeline_model_parallel_size == 1
    assert answer.choice.step_s < whole.choice.step_s
    assert "encoder tasks, cut into layer chunks, in the waits" in explain(answer).sentences[0]


def test_encoders_on_ranks_of_their_own_feed_an_interleaved_pipeline():
    answer = make_plan(problem(model(ENCODER), 6, 8, pins=DEEP))

    plan = Plan.loads(answer.plan().to_yaml(), where="plan.yaml")
    assert plan.language.virtual_pipeline_model_parallel_size > 1
    assert not set(plan.language.ranks) & set(plan.modules["vision"].ranks)
    verify(plan, build_schedule(plan))
    assert explain(answer).sentences[0].startswith("The disjoint layout with interleaved stages")


def test_filled_waits_keep_few_encoder_tasks_where_memory_is_short():
    encoder_tasks = encoder("vision", hidden=2048, layers=12, tokens=4096, trainable=None)
    pins = {**DEEP, "placement": "colocated", "schedule.kind": "bubble_fill"}
    pins["schedule.encoder_group"] = "1"
    asked = problem(model(encoder_tasks), 4, 16, pins=pins)
    roomy = make_plan(asked).choice
    tight = replace(asked, cluster=cluster(4, memory_gib=roomy.step.peak_bytes / 2**30 + 2.5))

    choice = make_plan(tight).choice

    assert roomy.plan.schedule.max_live is None
    assert choice.plan.schedule.max_live is not None
    assert choice.step.peak_bytes <= tight.memory_bytes < roomy.step.peak_bytes


def test_check_shows_the_groups_of_filled_waits(tmp_path, capsys):
    plan = plan_of(
        "bubble_fill",
        place("vision", 0, 1, dp=2),
        place("language", 0, 1, pp=2),
        num_microbatches=8,
        group=4,
    )
    plan.write(tmp_path / "plan.yaml")

    assert main(["check", f"{tmp_path / 'plan.yaml'}"]) == 0

    # Four microbatches of a sample on two replicas.
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("vision"))
    assert row.split()[-2:] == ["4", "2"]


def test_memory_of_an_interleaved_rank_is_what_its_tasks_hold_at_once():
    language_place = replace(place("language", 0, 1, pp=2), virtual_pipeline_model_parallel_size=2)
    plan = plan_of("interleaved", language_place, num_microbatches=4)
    costs = CostModel(model(), cluster(8))
    held = [stage.memory for stage in costs.plan_stages(plan)["language"]]

    first, _ = (terms["activations"] for terms in costs.plan_memory(plan).values())

    # F0.0 F1.0 F0.2 F1.2 F2.0 B0.2 F3.0: four microbatches of stage 0 and one of stage 2.
    assert first == pytest.approx(4 * held[0].activations_per_task + held[2].activations_per_task)
