import dataclasses

import pytest
from hypothesis import given, settings

from megatron_mosaic.errors import LayoutError, PlanError
from megatron_mosaic.layout.attention import AttentionPlan
from megatron_mosaic.layout.placement import ModulePlacement
from megatron_mosaic.layout.plan import Plan, ScheduleChoice, check_world_size
from tests.layout.legal_plans import legal_plans

PLAN_YAML = """\
format: 1
world_size: 10
global_batch_size: 64
micro_batch_size: 2
modules:
  language:
    ranks: 0-7
    tensor_model_parallel_size: 2
    data_parallel_size: 2
    pipeline_model_parallel_size: 2
    sequence_parallel: true
    layers_per_stage: [17, 15]
  vision:
    ranks: [0, 2-6]
    data_parallel_size: 6
    trainable: [projector]
edges:
- [vision, language]
schedule: {kind: colocated, encoder_group: 4}
predicted:
  step_s: 1.84
  peak_bytes: [1, 2]
inputs: {model: 5e884898}
"""


def plan_of(**changes):
    placements = {
        "language": ModulePlacement(
            name="language", ranks=(0, 1, 2, 3), data_parallel_size=2, tensor_model_parallel_size=2
        ),
        "vision": ModulePlacement(name="vision", ranks=(1,)),
    }
    parts = {
        "world_size": 6,
        "global_batch_size": 16,
        "micro_batch_size": 2,
        "modules": placements,
        "edges": (("vision", "language"),),
        "schedule": ScheduleChoice(kind="colocated"),
    }
    return Plan(**{**parts, **changes})


def test_plan_reads_every_field():
    assert Plan.loads(PLAN_YAML, "plan.yaml") == Plan(
        world_size=10,
        global_batch_size=64,
        micro_batch_size=2,
        modules={
            "vision": ModulePlacement(
                name="vision",
                ranks=(0, 2, 3, 4, 5, 6),
                data_parallel_size=6,
                trainable=("projector",),
            ),
            "language": ModulePlacement(
                name="language",
                ranks=(0, 1, 2, 3, 4, 5, 6, 7),
                tensor_model_parallel_size=2,
                data_parallel_size=2,
                pipeline_model_parallel_size=2,
                sequence_parallel=True,
                layers_per_stage=(17, 15),
            ),
        },
        edges=(("vision", "language"),),
        schedule=ScheduleChoice(kind="colocated", encoder_group=4),
        predicted={"step_s": 1.84, "peak_bytes": [1, 2]},
        inputs={"model": "5e884898"},
    )


def test_plan_writes_the_text_it_read():
    assert Plan.loads(PLAN_YAML, "plan.yaml").to_yaml() == PLAN_YAML


@settings(max_examples=150, deadline=None)
@given(legal_plans())
def test_plan_survives_round_trip(plan):
    read = Plan.loads(plan.to_yaml(), "plan.yaml")

    assert read == plan
    assert read.digest() == plan.digest()


def test_plan_survives_round_trip_through_file(tmp_path):
    path = tmp_path / "plan.yaml"
    plan = plan_of(inputs={"modèle": "été"})

    plan.write(path)

    assert Plan.load(path) == plan


def test_plan_reads_file_with_byte_order_mark(tmp_path):
    path = tmp_path / "plan.yaml"
    path.write_text(PLAN_YAML, encoding="utf-8-sig")

    assert Plan.load(path) == Plan.loads(PLAN_YAML, "plan.yaml")


def test_plan_sorts_modules_by_name():
    placements = plan_of().modules
    reversed_modules = {name: placements[name] for name in ("vision", "language")}

    assert list(plan_of(modules=reversed_modules).modules) == ["language", "vision"]


def test_plan_counts_microbatches():
    # 16 samples / (2 per microbatch and replica * 2 replicas)
    assert plan_of().num_microbatches == 4


def test_plan_names_modules_of_rank():
    plan = plan_of()

    assert [plan.modules_of(rank) for rank in (0, 1, 5)] == [
        ("language",),
        ("language", "vision"),
        (),
    ]


def test_plan_names_encoders():
    assert plan_of().encoders == ("vision",)


def test_plan_of_language_alone_is_legal():
    plan = plan_of(
        modules={"language": ModulePlacement(name="language", ranks=(3,))},
        edges=(),
        schedule=ScheduleChoice(kind="no_pipelining"),
    )

    assert plan.encoders == ()


def test_digest_ignores_spelling():
    spelled = PLAN_YAML.replace("0-7", "[0-3, 4, 5, 6-7]").replace(
        "ranks: [0, 2-6]", "ranks: [0, 2-6]  # all but one\n    context_parallel_size: 1"
    )

    assert Plan.loads(spelled, "x").digest() == Plan.loads(PLAN_YAML, "plan.yaml").digest()


def test_digest_ignores_what_the_planner_notes():
    plan = plan_of()
    noted = dataclasses.replace(plan, predicted={"step_s": 1.0}, inputs={"tool": "0.1.0"})

    assert noted.digest() == plan.digest()


@pytest.mark.parametrize(
    "changes",
    [
        {"world_size": 7},
        {"global_batch_size": 32},
        {"micro_batch_size": 1},
        {"schedule": ScheduleChoice(kind="colocated", encoder_group=2)},
        {"schedule": ScheduleChoice(kind="no_pipelining")},
    ],
    ids=str,
)
def test_digest_changes_with_the_run(changes):
    assert plan_of(**changes).digest() != plan_of().digest()


@pytest.mark.parametrize(
    "changes",
    [
        {"ranks": (2,)},
        {"trainable": ()},
        {"trainable": ("projector",)},
        {"layers_per_stage": (8,)},
        {"recompute": "full"},
    ],
    ids=str,
)
def test_digest_changes_with_a_placement(changes):
    modules = dict(plan_of().modules)
    modules["vision"] = dataclasses.replace(modules["vision"], **changes)

    assert plan_of(modules=modules).digest() != plan_of().digest()


@pytest.mark.parametrize(
    "changes", [{"expert_model_parallel_size": 2}, {"expert_tensor_parallel_size": 1}], ids=str
)
def test_experts_change_the_digest_and_survive_the_round_trip(changes):
    modules = dict(plan_of().modules)
    modules["language"] = dataclasses.replace(modules["language"], **changes)
    plan = plan_of(modules=modules)

    assert plan.digest() != plan_of().digest()
    assert Plan.loads(plan.to_yaml(), "plan.yaml") == plan


@pytest.mark.parametrize(
    ("module", "changes"),
    [
        ("language", {"attention": AttentionPlan(mask="causal")}),
        ("vision", {"items": "balanced"}),
    ],
    ids=str,
)
def test_attention_and_items_change_the_digest_and_survive_the_round_trip(module, changes):
    modules = dict(plan_of().modules)
    modules[module] = dataclasses.replace(modules[module], **changes)
    plan = plan_of(modules=modules)

    assert plan.digest() != plan_of().digest()
    assert Plan.loads(plan.to_yaml(), "plan.yaml") == plan


def test_plan_writes_attention_without_its_defaults():
    modules = dict(plan_of().modules)
    attention = AttentionPlan(mask="multimodal_packed", tokens="local")
    modules["language"] = dataclasses.replace(
        modules["language"],
        data_parallel_size=1,
        context_parallel_size=2,
        attention=attention,
    )

    text = plan_of(modules=modules).to_yaml()

    assert "    attention: {mask: multimodal_packed, tokens: local}\n" in text


def test_attention_defaults_are_balanced_tokens_and_keys_by_cost():
    assert AttentionPlan(mask="prefix_lm") == AttentionPlan(
        mask="prefix_lm", tokens="balanced", keys="auto"
    )


def test_digest_is_stable_between_versions():
    # Computed once: ranks of one run may have different minor versions of the package.
    assert plan_of().digest() == "ba37f7c02ecd83880f8b5d02b7fba772de2e913bb6100d1a0cc74f95dad2b648"


def test_plan_names_the_file_in_form_errors():
    with pytest.raises(PlanError, match=r"^run/plan\.yaml: world_size='ten' must be an integer"):
        Plan.loads(PLAN_YAML.replace("world_size: 10", "world_size: ten"), "run/plan.yaml")


def test_plan_names_the_file_in_contradictions():
    with pytest.raises(LayoutError, match=r"^run/plan\.yaml: modules\.vision: ranks=\[0, 2-6\]"):
        Plan.loads(PLAN_YAML.replace("size: 6", "size: 5"), "run/plan.yaml")


def test_plan_built_in_python_is_checked_too():
    with pytest.raises(LayoutError, match=r"^global_batch_size=18 must be .*2\*2=4; use 16 or 20"):
        plan_of(global_batch_size=18)


def test_plan_reports_an_encoder_that_feeds_only_encoders():
    modules = {**plan_of().modules, "audio": ModulePlacement(name="audio", ranks=(0,))}
    modules["tiles"] = ModulePlacement(name="tiles", ranks=(0,))

    with pytest.raises(LayoutError, match=r"modules\.audio: edges=.* must connect audio with"):
        plan_of(modules=modules, edges=(("vision", "language"), ("audio", "tiles")))


def test_contradiction_is_reported_before_missing_feature():
    modules = dict(plan_of().modules)
    modules["vision"] = dataclasses.replace(
        modules["vision"], ranks=(8, 9), context_parallel_size=2
    )

    with pytest.raises(LayoutError, match=r"ranks=8-9 must be < world_size=6"):
        plan_of(modules=modules)


def test_check_world_size_accepts_equal_number():
    check_world_size(plan_of(), 6)


def test_check_world_size_refuses_other_number():
    with pytest.raises(LayoutError, match=r"^plan: world_size=6 must equal the 4 launched ranks; "):
        check_world_size(plan_of(), 4)


def test_message_about_a_name_with_a_line_break_stays_one_line():
    broken = PLAN_YAML.replace("[vision, language]", '["vis\\nion", language]')

    with pytest.raises(
        LayoutError, match=r"^plan: edges: edge=\['vis\\nion', 'language'\] must .*$"
    ):
        Plan.loads(broken, "plan")
