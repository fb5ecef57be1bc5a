import json
import random
from dataclasses import replace

import pytest

from megatron_mosaic.cli import main
from megatron_mosaic.errors import PlanError
from megatron_mosaic.layout.model_facts import ModuleFacts, check_module
from megatron_mosaic.layout.plan import Plan
from megatron_mosaic.planner.candidate import plan_of
from megatron_mosaic.planner.estimate import Estimator
from megatron_mosaic.planner.legal_sizes import language_sizes
from megatron_mosaic.planner.placements import every_candidate
from megatron_mosaic.planner.planner import make_plan
from megatron_mosaic.planner.problem import read_pins
from megatron_mosaic.planner.search import search
from megatron_mosaic.planner.simulated import simulated
from megatron_mosaic.schedule.build import max_live
from megatron_mosaic.schedule.graph import Stage
from tests.planner.problems import cluster, cost_model, encoder, language, model, problem

ENCODER = encoder("vision")
BIG_ENCODER = encoder("vision", hidden=2048, layers=12, trainable=None)
AUDIO = encoder("audio", hidden=512, heads=8, layers=4, tokens=1500, trainable=())

SMALL = {
    "one encoder": problem(model(ENCODER), 8, 16),
    "two encoders": problem(model(BIG_ENCODER, AUDIO), 6, 12),
    "experts": problem(model(ENCODER, language=language(experts=8)), 8, 16),
    "long sequences": problem(model(language=language(tokens=16384)), 8, 8),
    "three ranks": problem(model(BIG_ENCODER), 3, 12),
}


def candidates(asked, *, count):
    """Some of all candidates that fit, evenly chosen."""
    found = [
        candidate
        for micro_batch_size in (1, 2)
        for sizes in language_sizes(asked, micro_batch_size=micro_batch_size)
        for candidate in every_candidate(asked, sizes, micro_batch_size)
    ]
    return random.Random(1).sample(found, min(count, len(found)))


def facts(module):
    mixer, mlp = module.layers[0].layer.mixer, module.layers[0].layer.mlp
    experts = getattr(mlp, "num_experts", None)
    is_language = module.name == "language"
    return ModuleFacts(
        num_layers=module.num_layers,
        num_attention_heads=mixer.num_heads,
        num_query_groups=mixer.num_query_groups,
        hidden_size=module.hidden_size,
        ffn_hidden_size=mlp.ffn_hidden_size,
        sequence_length=round(module.tokens_per_item.largest) if is_language else None,
        num_experts=experts,
        moe_ffn_hidden_size=mlp.ffn_hidden_size if experts else None,
    )


def plan_for(asked, estimate):
    return plan_of(
        estimate.candidate,
        model=asked.model,
        num_gpus=asked.num_gpus,
        global_batch_size=asked.global_batch_size,
        layers_per_stage=estimate.layers_per_stage,
    )


@pytest.mark.parametrize("name", SMALL)
def test_every_candidate_is_a_legal_plan_that_the_model_allows(name):
    asked = SMALL[name]
    estimator = Estimator(asked, cost_model(asked))
    estimates = [estimator.estimate(c) for c in candidates(asked, count=150)]
    assert sum(estimate is not None for estimate in estimates) >= 50

    for estimate in filter(None, estimates):
        plan = plan_for(asked, estimate)
        for placement in plan.modules.values():
            check_module(placement, facts(asked.model.modules[placement.name]))
        assert Plan.loads(plan.to_yaml(), "written").digest() == plan.digest()


def test_live_tasks_of_estimates_are_those_of_the_schedules():
    asked = SMALL["two encoders"]
    estimator = Estimator(asked, cost_model(asked))
    for candidate in candidates(asked, count=100):
        estimate = estimator.estimate(candidate)
        if estimate is None:
            continue
        plan = plan_for(asked, estimate)
        for name, hosted in estimate.modules.items():
            if not any(stage.backward_s for stage in hosted.stages):
                continue
            for number, live in enumerate(hosted.live_tasks):
                stage = Stage(name, number)
                expected = max_live(plan, stage, num_microbatches=plan.num_microbatches)
                assert live == expected, (candidate, stage)


def test_closed_form_is_close_to_the_simulation_for_all_placements():
    asked = SMALL["two encoders"]
    estimator = Estimator(asked, cost_model(asked))
    placements = set()
    for candidate in candidates(asked, count=100):
        estimate = estimator.estimate(candidate)
        if estimate is not None:
            placements.add(candidate.placement)
            step_s = simulated(estimate, asked, estimator.cost_model).step_s
            # Mixtures of shared and own ranks are estimated as if nothing overlapped.
            slack = 0.35 if candidate.placement == "partial overlap" else 0.1
            assert estimate.step_s == pytest.approx(step_s, rel=slack), candidate
    assert {"colocated", "disjoint", "partial overlap"} <= placements


@pytest.mark.parametrize("name", SMALL)
def test_plans_of_the_planner_pass_the_check_command(name, tmp_path, capsys):
    path = tmp_path / "plan.yaml"
    answer = make_plan(SMALL[name])
    answer.plan().write(path)

    assert main(["check", str(path), "--world-size", str(SMALL[name].num_gpus)]) == 0
    assert f"on {SMALL[name].num_gpus} ranks" in capsys.readouterr().out


def test_plan_carries_prediction_baseline_and_digests():
    answer = make_plan(SMALL["one encoder"])

    plan = answer.plan()

    assert plan.predicted["step_s"] == pytest.approx(answer.choice.step_s, rel=1e-5)
    assert plan.predicted["baseline"]["step_s"] >= plan.predicted["step_s"]
    assert plan.inputs["model"].startswith("sha256:")


def test_search_is_deterministic():
    found = [search(SMALL["two encoders"], cost_model(SMALL["two encoders"])) for _ in range(2)]

    assert [e.candidate for e in found[0].best] == [e.candidate for e in found[1].best]
    assert found[0].num_estimates == found[1].num_estimates


@pytest.mark.parametrize("name", SMALL)
def test_answer_is_never_slower_than_its_baseline_nor_out_of_memory(name):
    asked = replace(SMALL[name], cluster=cluster(SMALL[name].num_gpus, memory_gib=14.0))

    answer = make_plan(asked)

    if answer.baseline is not None:
        assert answer.choice.step_s <= answer.baseline.step_s
    assert all(entry.step.peak_bytes <= asked.memory_bytes for entry in answer.best)


def test_homogeneous_encoders_inherit_sizes_of_language():
    baseline = make_plan(SMALL["one encoder"]).baseline.candidate

    vision = baseline.encoders[0]
    assert baseline.is_homogeneous
    assert (vision.sizes.tp, vision.sizes.dp) == (baseline.language.tp, baseline.language.dp)


@pytest.mark.parametrize(
    ("pins", "holds"),
    [
        ({"language.tensor_model_parallel_size": "4"}, lambda c: c.language.tp == 4),
        ({"micro_batch_size": "2"}, lambda c: c.micro_batch_size == 2),
        ({"schedule.kind": "1f1b"}, lambda c: c.kind == "1f1b"),
        ({"schedule.encoder_group": "2"}, lambda c: c.encoder_group == 2),
        ({"placement": "disjoint"}, lambda c: c.placement == "disjoint"),
        ({"vision.data_parallel_size": "2"}, lambda c: c.encoders[0].sizes.dp == 2),
        ({"vision.recompute": "full"}, lambda c: c.encoders[0].sizes.recompute == "full"),
        ({"language.recompute": "none"}, lambda c: c.language.recompute is None),
    ],
)
def test_pinned_fields_hold_in_every_plan(pins, holds):
    asked = SMALL["one encoder"]
    answer = make_plan(replace(asked, pins=read_pins(pins, model=asked.model)))

    assert all(holds(entry.candidate) for entry in answer.best)


def test_pinned_layers_are_taken_as_they_are():
    asked = SMALL["one encoder"]
    pins = read_pins({"language.layers_per_stage": "[3, 5]"}, model=asked.model)

    answer = make_plan(replace(asked, pins=pins))

    assert answer.choice.layers_per_stage["language"] == (3, 5)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("language.tensor_paralel_size", "2", r"set: language.tensor_paralel_size must name one"),
        ("visio.recompute", "full", r"set: visio.recompute must be a field .*vision.recompute"),
        ("micro_batch_size", "0", r"set: micro_batch_size=0 must be an integer >= 1"),
        ("schedule.kind", "1f2b", r"set: schedule.kind='1f2b' must be one of .*1f1b"),
        ("vision.recompute", "half", r"set: vision.recompute='half' must be one of none"),
        ("language.layers_per_stage", "8", r"must be a list of layers; write \[17, 15\]"),
    ],
)
def test_wrong_pins_are_refused(field, value, message):
    with pytest.raises(PlanError, match=message):
        read_pins({field: value}, model=SMALL["one encoder"].model)


def test_nothing_fits_names_the_term_in_the_way_and_the_gpus_that_fit():
    asked = problem(model(BIG_ENCODER), 1, 8, memory_gib=6.0)

    with pytest.raises(
        PlanError,
        match=r"memory=.* GiB on a rank of language stage 0 and vision stage 0 must be <= 3.0 GiB "
        r"of cluster h100, .*; optimizer=.* GiB is in the way; use \d+ GPUs",
    ):
        make_plan(asked)


def test_nothing_fits_names_the_pin_that_is_in_the_way():
    asked = problem(model(ENCODER), 2, 256, memory_gib=10.0)
    assert search(asked, cost_model(asked)).best
    pins = {"language.recompute": "full", "micro_batch_size": "128"}

    with pytest.raises(PlanError, match=r"remove the pinned micro_batch_size, or choose another"):
        make_plan(replace(asked, pins=read_pins(pins, model=asked.model)))


def test_illegal_pins_are_named():
    asked = SMALL["one encoder"]
    pins = read_pins({"language.tensor_model_parallel_size": "3"}, model=asked.model)

    with pytest.raises(
        PlanError, match=r"must allow a legal layout; remove the pinned language.tensor_model_par"
    ):
        make_plan(replace(asked, pins=pins))


def test_more_gpus_than_the_cluster_has_are_refused():
    with pytest.raises(PlanError, match=r"gpus=16 must be <= the 8 GPUs of cluster h100"):
        replace(SMALL["one encoder"], num_gpus=16)


def test_time_limit_ends_with_a_bound_below_the_best():
    ticks = iter(range(10_000))
    asked = SMALL["one encoder"]

    found = search(asked, cost_model(asked), time_limit_s=3, clock=lambda: float(next(ticks)))
    whole = search(asked, cost_model(asked))

    assert found.bound_s <= whole.best[0].step_s <= found.best[0].step_s
    assert found.num_estimates < whole.num_estimates
    assert found.gap >= 0


def test_plan_command_without_model_shows_what_there_is(capsys):
    assert main(["plan"]) == 0

    out = capsys.readouterr().out
    assert "llava-1.5-7b" in out
    assert "h100" in out
    assert "example:  megatron-mosaic plan " in out


def test_plan_command_prints_json_and_writes_the_plan(tmp_path, capsys):
    path = tmp_path / "plan.yaml"
    command = ["plan", "llava-1.5-7b", "h100", "--gpus", "8", "--global-batch-size", "32"]

    assert main([*command, "--json", "-o", str(path), "--top", "2"]) == 0

    document = json.loads(capsys.readouterr().out)
    assert len(document["best"]) == 2
    assert document["best"][0]["step_s"] <= document["baseline"]["step_s"]
    assert {case["constant"] for case in document["sensitivity"]} == {
        "link bandwidth",
        "matmul efficiency",
        "backward/forward ratio",
        "encoder tokens per sample",
    }
    assert Plan.load(path).predicted["step_s"] == document["best"][0]["step_s"]


def test_plan_command_explains_in_words(capsys):
    command = ["plan", "llava-1.5-7b", "h100", "--gpus", "8", "--global-batch-size", "32"]

    assert main(command) == 0

    out = capsys.readouterr().out
    assert "The fullest rank (language.0" in out
    assert "of 8 cases of constants 20 % off" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["llava-1.5-7b"], "error: plan: cluster must be given"),
        (["llava-1.5-7b", "h100"], "error: plan: --global-batch-size must be given"),
        (
            ["llama-3.1-405b", "h100", "--gpus", "8", "--global-batch-size", "8"],
            "error: model llama-3.1-405b: memory=",
        ),
        (
            ["llava-1.5-7b", "h100", "--gpus", "0", "--global-batch-size", "8"],
            "error: gpus=0 must be >= 1",
        ),
        (
            ["llava-1.5-7b", "h100", "--global-batch-size", "8", "--set", "micro_batch_size"],
            "error: set: micro_batch_size must be a field and its value",
        ),
    ],
)
def test_plan_command_refuses_in_one_line(arguments, message, capsys):
    assert main(["plan", *arguments]) == 2

    captured = capsys.readouterr()
    assert captured.err.startswith(message)
    assert captured.err.count("\n") == 1


def test_plan_names_what_trains_as_model_files_do():
    asked = problem(model(ENCODER, language=language(trainable=("output_layer",))), 4, 16)

    plan = make_plan(asked, cost_model=cost_model(asked)).plan()

    assert plan.modules["language"].trainable == ("output_layer",)
    assert plan.modules["vision"].trainable == ("projector",)
