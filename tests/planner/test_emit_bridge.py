"""Plans as configurations of Megatron-Bridge: literal text, and what they refuse."""

import pytest

from megatron_mosaic.errors import PlanError
from megatron_mosaic.layout.plan import Plan
from megatron_mosaic.planner.emit.bridge import module_parallelisms, plan_of_parallelisms
from tests.planner.emitted import DISJOINT, HOMOGENEOUS, LANGUAGE, SEQUENCE_PARALLEL, emitted


def test_bridge_takes_modules_side_by_side():
    text = emitted("bridge", DISJOINT).text

    assert (
        text
        == """\
from megatron.bridge.models.megatron_mimo import (
    MegatronMIMOParallelismConfig,
    ModuleParallelismConfig,
)

parallelism = MegatronMIMOParallelismConfig(
    module_parallelisms={
        "language": ModuleParallelismConfig(
            tensor_model_parallel_size=2,
            data_parallel_size=2,
            pipeline_model_parallel_size=3,
            rank_offset=4,
        ),
        "vision": ModuleParallelismConfig(
            tensor_model_parallel_size=2,
            data_parallel_size=2,
            rank_offset=0,
        ),
    },
)
cfg.train.micro_batch_size = 4  # of all replicas
cfg.train.global_batch_size = 64"""
    )
    compile(text, "config.py", "exec")


def test_bridge_takes_experts_and_several_encoders():
    source = DISJOINT.replace("world_size: 16", "world_size: 18").replace(
        "[vision, language]]", "[vision, language], [audio, language]]"
    )
    source = source.replace(
        "edges:", "  audio: {ranks: 16-17, data_parallel_size: 2, trainable: []}\nedges:"
    ).replace("stage", "stage")
    source = source.replace(
        "pipeline_model_parallel_size: 3",
        "pipeline_model_parallel_size: 3\n    expert_model_parallel_size: 4\n"
        "    expert_tensor_parallel_size: 1",
    )

    emission = emitted("bridge", source)

    assert (
        """\
            pipeline_model_parallel_size=3,
            expert_model_parallel_size=4,
            expert_tensor_parallel_size=1,
            rank_offset=4,
"""
        in emission.text
    )
    assert (
        """\
        "audio": ModuleParallelismConfig(
            data_parallel_size=2,
            rank_offset=16,
        ),
"""
        in emission.text
    )
    assert emission.notes == (
        "modules.audio: trainable=[] is for the provider's freeze_* fields to keep",
    )


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (LANGUAGE, r"modules: names=\['language'\] must have an encoder beside language"),
        (HOMOGENEOUS, r"modules\.vision: ranks=0-3 must be 8-11, the next ones that no other"),
        (SEQUENCE_PARALLEL, r"modules\.language: sequence_parallel=true must be false for"),
        (
            DISJOINT.replace(
                "tensor_model_parallel_size: 2, data", "context_parallel_size: 2, data"
            ),
            r"modules\.vision: context_parallel_size=2 must be 1",
        ),
        (
            DISJOINT.replace(
                "tensor_model_parallel_size: 2, data_parallel_size: 2", "data_parallel_size: 4"
            ).replace("micro_batch_size: 2", "micro_batch_size: 1"),
            r"modules\.vision: data_parallel_size=4 must divide the 2 samples of a microbatch",
        ),
    ],
)
def test_bridge_refuses_what_its_configuration_cannot_say(source, message):
    with pytest.raises(PlanError, match=message):
        emitted("bridge", source)


def fields_of(source):
    return module_parallelisms(Plan.loads(source, where="plan.yaml"))


def test_plan_returns_from_the_fields_of_bridge():
    plan = Plan.loads(DISJOINT, where="plan.yaml")

    # 2 samples of each of 2 replicas.
    assert (
        plan_of_parallelisms(fields_of(DISJOINT), micro_batch_size=4, global_batch_size=64) == plan
    )


def test_plan_with_experts_returns_from_the_fields_of_bridge():
    source = DISJOINT.replace(
        "pipeline_model_parallel_size: 3",
        "pipeline_model_parallel_size: 3\n    expert_model_parallel_size: 4\n"
        "    expert_tensor_parallel_size: 1",
    )
    plan = plan_of_parallelisms(fields_of(source), micro_batch_size=4, global_batch_size=64)

    assert plan == Plan.loads(source, where="plan.yaml")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"language": None},
            r"module_parallelisms: names=\['vision'\] must include language; name",
        ),
        (
            {"language": {"data_parallel_size": 3}},
            r"module_parallelisms\.language: data_parallel_size=3 must divide the 4 samples",
        ),
        (
            {"vision": {"data_parallel_size": None}},
            r"module_parallelisms\.vision: data_parallel_size=None must be >= 1; give a positive",
        ),
        ({"vision": {"rank_offset": -1}}, r"vision: rank_offset=-1 must be >= 0; give the first"),
        ({"vision": {"sms": 2}}, r"vision: fields=\['sms'\] must be among tensor_model_parallel"),
    ],
)
def test_fields_that_make_no_plan_are_refused(changed, message):
    fields = {
        name: {**module, **(changed.get(name) or {})}
        for name, module in fields_of(DISJOINT).items()
        if changed.get(name, {}) is not None
    }

    with pytest.raises(PlanError, match=message):
        plan_of_parallelisms(fields, micro_batch_size=4, global_batch_size=64)
