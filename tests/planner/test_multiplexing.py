"""Modules that run at the same time on the ranks they share: when the planner lets them."""

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.optimal_sharing import fastest_shared
from megatron_mosaic.cli import main
from megatron_mosaic.cluster.shipped import load_cluster
from megatron_mosaic.errors import LayoutError, PlanError
from megatron_mosaic.layout.plan import Plan
from megatron_mosaic.planner import multiplexing
from megatron_mosaic.planner.explanation import as_document, explain
from megatron_mosaic.planner.filling import ordered
from megatron_mosaic.planner.multiplexing import LEAST_GAIN, least_s, multiplexed
from megatron_mosaic.planner.planner import make_plan
from megatron_mosaic.planner.problem import Problem, Space, read_pins
from megatron_mosaic.planner.quotas import first_quotas, is_legal, more_quotas, sharing_modules
from megatron_mosaic.report.prediction import predicted_timeline, read_prediction
from megatron_mosaic.schedule.build import build_schedule
from megatron_mosaic.schedule.verify import verify
from tests.planner.problems import cost_model, encoder, language, model

VISION = encoder("vision", hidden=1024, layers=6, tokens=577, trainable=None)
AUDIO = encoder("audio", hidden=512, heads=8, layers=4, tokens=250, trainable=())
TEXT = language(hidden=1024, layers=6, heads=16, tokens=256)


def problem(spec, num_gpus=1, batch=32, *, cluster="h200", pins=None, **space):
    """A problem of few samples that leaves much of a GPU idle."""
    return Problem(
        model=spec,
        cluster=load_cluster(cluster, num_gpus=num_gpus),
        num_gpus=num_gpus,
        global_batch_size=batch,
        pins=read_pins(pins or {}, model=spec),
        space=Space(**{"micro_batch_sizes": (4,), "recompute": (None,), **space}),
    )


TWO = problem(model(VISION, language=TEXT))
PINNED = problem(model(VISION, language=TEXT), pins={"schedule.kind": "concurrent"})


def test_pinned_schedule_runs_modules_at_the_same_time():
    answer = make_plan(PINNED)

    plan = Plan.loads(answer.plan().to_yaml(), where="plan.yaml")
    assert plan.schedule.kind == "concurrent"
    assert plan.schedule.order is not None
    verify(plan, build_schedule(plan))
    assert answer.choice.step.peak_bytes <= PINNED.memory_bytes
    assert answer.multiplexing.pays


def test_notes_give_back_the_step_of_modules_that_run_at_the_same_time():
    answer = make_plan(PINNED)
    plan = Plan.loads(answer.plan().to_yaml(), where="plan.yaml")

    timeline = predicted_timeline(plan, read_prediction(plan))

    terms = answer.choice.step.breakdown
    step_s = timeline.makespan_s + terms.sync_s + terms.optimizer_s
    assert step_s == pytest.approx(answer.choice.step_s, rel=1e-4)


def test_pinned_quota_holds_and_fixes_the_schedule():
    asked = problem(TWO.model, pins={"vision.share.sms": "40"})

    plan = make_plan(asked).plan()

    assert plan.schedule.kind == "concurrent"
    assert plan.modules["vision"].share.sms == 40


def test_pinned_absence_of_a_quota_holds():
    asked = problem(TWO.model, pins={"schedule.kind": "concurrent", "language.share.sms": "none"})

    assert make_plan(asked).plan().language.share is None


@pytest.mark.parametrize("kind", ["colocated", "no_pipelining"])
def test_another_pinned_schedule_excludes_it(kind):
    answer = make_plan(problem(TWO.model, pins={"schedule.kind": kind}))

    assert {entry.candidate.kind for entry in answer.best} == {kind}
    assert answer.multiplexing.num_examined == 0


@pytest.mark.parametrize(
    ("pins", "message"),
    [
        (
            {"vision.share.sms": "32", "schedule.kind": "colocated"},
            r"^set: vision\.share\.sms=32 must go with schedule\.kind=concurrent, not colocated; ",
        ),
        ({"vision.share.sms": "0"}, r"^set: vision\.share\.sms=0 must be an integer >= 1; "),
        ({"vision.share": "32"}, r"^set: vision\.share must name one of .*share\.sms; "),
    ],
)
def test_quota_that_cannot_be_is_refused(pins, message):
    with pytest.raises(PlanError, match=message):
        read_pins(pins, model=TWO.model)


def test_quota_that_the_gpu_cannot_give_is_refused_with_those_next_to_it():
    message = r"^set: gpu .*: share\.sms=33 must be a group of >= 8 SMs .*; use 32 or 36$"

    with pytest.raises(LayoutError, match=message):
        problem(TWO.model, pins={"vision.share.sms": "33"})


@pytest.mark.parametrize(
    ("pins", "message"),
    [
        ({"placement": "homogeneous"}, "a layout whose modules share ranks"),
        ({"language.tensor_model_parallel_size": "2"}, "CUDA_DEVICE_MAX_CONNECTIONS=1 before"),
    ],
)
def test_schedule_that_no_layout_allows_is_refused(pins, message):
    asked = problem(TWO.model, 2, pins={"schedule.kind": "concurrent", **pins})

    with pytest.raises(PlanError, match=rf"^set: schedule\.kind=concurrent must find .*{message}"):
        make_plan(asked)


def test_tensor_parallel_modules_share_blackwell_gpus():
    pins = {"schedule.kind": "concurrent", "language.tensor_model_parallel_size": "2"}

    plan = make_plan(problem(TWO.model, 2, cluster="b200", pins=pins)).plan()

    assert plan.language.tensor_model_parallel_size == 2


def serial_plan(asked, best, *, gain):
    """A plan without lanes whose step is longer than another one's by a share of that."""
    first = make_plan(replace(asked, space=replace(asked.space, multiplexing=False))).choice
    terms = first.step.breakdown
    more_s = best.step_s * (1 + gain) - first.step_s
    step = replace(first.step, breakdown=replace(terms, compute_s=terms.compute_s + more_s))
    return first._replace(step=step)


@pytest.mark.parametrize(("gain", "pays"), [(0.029, False), (0.031, True)])
def test_modules_run_at_the_same_time_from_three_percent_on(gain, pays):
    costs = cost_model(TWO)
    best = multiplexed([], TWO, costs).best
    serial = serial_plan(TWO, best, gain=gain)

    found = multiplexed([serial], TWO, costs)

    assert found.pays is pays
    assert found.gain == pytest.approx(gain)
    assert found.best.candidate == best.candidate


@pytest.mark.parametrize("num_gpus", [1, 2])
def test_search_finds_the_optimum_of_small_problems(num_gpus):
    asked = problem(TWO.model, num_gpus, batch=16)
    expected, count = fastest_shared(asked)

    found = multiplexed([], asked, cost_model(asked))

    assert expected is not None
    assert found.best.step_s == pytest.approx(expected.step_s, rel=1e-3)
    assert found.num_examined < count


def test_two_modules_have_every_split_of_a_gpu():
    entry = multiplexed([], TWO, cost_model(TWO)).best

    choices = list(more_quotas(entry, TWO))

    # An H200 has 132 multiprocessors in groups of 8: 8 | 124, 16 | 116, ..., 124 | 8 are 31 pairs
    # either way round, as 4 and 128 are a remainder's alone; a module alone has one of these sizes.
    pairs = {tuple(sms for _, sms in choice) for choice in choices if len(choice) == 2}
    assert all(sum(pair) == 132 for pair in pairs)
    assert {(8, 124), (64, 68), (68, 64), (124, 8)} <= pairs
    assert () in choices
    assert (("vision", 32),) in choices
    assert (("language", 32),) in choices


def test_first_quotas_are_in_proportion_to_the_work():
    entry = multiplexed([], TWO, cost_model(TWO)).best

    none, dealt, capped = first_quotas(entry, TWO)

    assert none == ()
    # 16 groups of 8 multiprocessors, and 4 that are left over for the module that has most.
    assert sum(sms for _, sms in dealt) == 132
    assert sorted(sms % 8 for _, sms in dealt) == [0, 4]
    assert capped == tuple(item for item in dealt if item[0] == "vision")


def test_no_quotas_are_faster_than_language_with_the_whole_gpu():
    costs = cost_model(TWO)
    entry = multiplexed([], TWO, costs).best

    steps_s = []
    for quotas in more_quotas(entry, TWO):
        candidate = replace(entry.candidate, quotas=quotas)
        steps_s.append(ordered(entry, candidate, entry.layers_per_stage, TWO, costs).step_s)

    assert len(steps_s) > 40
    assert least_s(entry.estimate) <= min(steps_s)


def test_three_modules_share_a_gpu():
    asked = problem(model(VISION, AUDIO, language=TEXT), pins={"schedule.kind": "concurrent"})

    answer = make_plan(asked)

    plan = answer.plan()
    verify(plan, build_schedule(plan))
    assert sharing_modules(plan) == ["audio", "language", "vision"]
    assert sum(placement.share.sms for placement in plan.modules.values() if placement.share) <= 132


@settings(max_examples=12, deadline=None)
@given(
    hidden=st.sampled_from((512, 1024)),
    layers=st.sampled_from((2, 6)),
    tokens=st.sampled_from((64, 577)),
    trainable=st.sampled_from((None, (), ("projector",))),
    text_tokens=st.sampled_from((128, 1024)),
    num_gpus=st.sampled_from((1, 2)),
    batch=st.sampled_from((8, 16)),
)
def test_plan_is_never_predicted_to_be_slower_than_one_module_at_a_time(
    hidden, layers, tokens, trainable, text_tokens, num_gpus, batch
):
    vision = encoder("vision", hidden=hidden, layers=layers, tokens=tokens, trainable=trainable)
    text = language(hidden=hidden, layers=layers, heads=16, tokens=text_tokens)
    asked = problem(model(vision, language=text), num_gpus, batch=batch)
    serial = make_plan(replace(asked, space=replace(asked.space, multiplexing=False))).choice

    answer = make_plan(asked)

    assert answer.choice.step_s <= serial.step_s
    assert answer.choice.step.peak_bytes <= asked.memory_bytes
    if answer.choice.candidate.kind == "concurrent":
        assert serial.step_s >= (1 + LEAST_GAIN) * answer.choice.step_s


def test_answer_is_the_same_every_time():
    plans = [make_plan(PINNED).plan().to_yaml() for _ in range(2)]

    assert plans[0] == plans[1]


def test_effort_is_bounded(monkeypatch):
    monkeypatch.setattr(multiplexing, "MAX_EXAMINED_TASKS", 100)

    found = multiplexed([], TWO, cost_model(TWO))

    # A plan with one microbatch in a group has 8 microbatches on 1 rank: 32 tasks.
    assert 1 <= found.num_examined <= 100 // 4
    assert found.best is not None


def test_gpu_of_which_nothing_is_known_is_not_shared():
    gpu = replace(TWO.cluster.gpu, sharing=None)
    asked = replace(TWO, cluster=replace(TWO.cluster, gpu=gpu))

    answer = make_plan(asked)

    assert answer.choice.candidate.kind != "concurrent"
    assert "profile --sharing" in answer.multiplexing.obstacle


def test_modules_in_fp8_are_not_shared():
    answer = make_plan(replace(TWO, model=replace(TWO.model, precision="fp8")))

    assert answer.multiplexing.num_examined == 0
    assert "modules in fp8" in answer.multiplexing.obstacle


def test_modules_with_collectives_have_32_multiprocessors_at_least():
    pins = {"schedule.kind": "concurrent", "language.tensor_model_parallel_size": "2"}
    asked = problem(TWO.model, 2, cluster="b200", pins=pins)
    plan = make_plan(asked).choice.plan

    # 148 multiprocessors; NCCL may have 32 thread blocks.
    assert not is_legal((("language", 24),), plan, asked)
    assert is_legal((("language", 32),), plan, asked)


def test_explanation_says_what_sharing_gains():
    explanation = explain(make_plan(PINNED))

    assert any(
        sentence.startswith("Modules run at the same time, ") and "of 132 SMs" in sentence
        for sentence in explanation.sentences
    )
    note = json.loads(json.dumps(as_document(explanation)))["multiplexing"]
    assert note["pays"]
    assert note["least_gain"] == 0.03
    assert note["best"]["step_s"] == explanation.answer.choice.step_s


def test_explanation_says_why_modules_run_one_at_a_time():
    # Large multiplications fill the GPU: nothing is idle that a second module could use.
    large = problem(
        model(
            encoder("vision", hidden=2048, layers=4, tokens=4096, trainable=None),
            language=language(hidden=4096, heads=32, layers=4, tokens=4096),
        ),
        batch=16,
        micro_batch_sizes=(4,),
    )

    answer = make_plan(large)

    assert answer.choice.candidate.kind != "concurrent"
    assert any(
        sentence.startswith("Modules run one at a time: ")
        and "CUDA_DEVICE_MAX_CONNECTIONS" in sentence
        for sentence in explain(answer).sentences
    )


def test_explanation_says_what_a_gain_that_is_too_small_would_be():
    answer = make_plan(PINNED)
    found = replace(answer.multiplexing, pays=False, serial_s=1.012 * answer.choice.step_s)

    sentences = explain(replace(answer, multiplexing=found)).sentences

    assert any("they would gain 1.2%, and less than 3% is not worth it" in it for it in sentences)


def test_command_prints_the_quotas(capsys):
    arguments = ["plan", "clip-vit-l-14", "h200", "--gpus", "1", "--global-batch-size", "64"]

    assert main([*arguments, "--set", "vision.share.sms=64"]) == 0

    out = capsys.readouterr().out
    assert "concurrent mbs" in out
    assert "sms 64" in out
