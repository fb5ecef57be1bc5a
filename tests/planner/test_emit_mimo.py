"""Plans as arguments of upstream's MIMO example: literal text, and what it refuses."""

import pytest

from megatron_mosaic.errors import PlanError
from tests.planner.emitted import LANGUAGE, SEQUENCE_PARALLEL, emitted, words_of


def test_mimo_takes_an_encoder_before_the_language_model():
    assert emitted("mimo", SEQUENCE_PARALLEL).text == (
        "--encoder-tp 2 \\\n"
        "  --encoder-dp 2 \\\n"
        "  --llm-offset 4 \\\n"
        "  --llm-tp 2 \\\n"
        "  --llm-pp 3 \\\n"
        "  --llm-dp 2 \\\n"
        "  --micro-batch-size 2 \\\n"
        "  --global-batch-size 64 \\\n"
        "  --use-distributed-optimizer \\\n"
        "  --calculate-per-token-loss"
    )


def test_mimo_takes_a_language_model_alone():
    emission = emitted("mimo", LANGUAGE)

    words = " ".join(words_of(emission.text))
    assert words.startswith("--llm-only --llm-offset 0 --llm-tp 2 --llm-pp 2 --llm-dp 2 ")
    assert "--recompute-granularity full --recompute-method uniform" in words


def test_mimo_takes_a_language_model_of_one_stage_without_pipelining():
    source = LANGUAGE.replace("pipeline_model_parallel_size: 2", "context_parallel_size: 1")
    source = source.replace("data_parallel_size: 2", "data_parallel_size: 4")

    assert "--llm-dp 4" in emitted("mimo", source.replace("1f1b", "no_pipelining")).text


@pytest.mark.parametrize(
    ("change", "to", "message"),
    [
        ("sequence_parallel: true", "sequence_parallel: false", r"sequence_parallel=false must be"),
        (
            "ranks: 4-15",
            "ranks: [5, 4, 6-15]",
            r"language: ranks=\[5, 4, 6-15\] must be 4-15, the n",
        ),
        (
            "tensor_model_parallel_size: 2, data_parallel_size: 2",
            "context_parallel_size: 2, data_parallel_size: 2",
            r"modules\.vision: context_parallel_size=2 must be 1 for --format mimo",
        ),
        (
            "tensor_model_parallel_size: 2, data_parallel_size: 2",
            "pipeline_model_parallel_size: 2, data_parallel_size: 2",
            r"modules\.vision: pipeline_model_parallel_size=2 must be 1",
        ),
        (
            "pipeline_model_parallel_size: 3",
            "pipeline_model_parallel_size: 3\n    layers_per_stage: [9, 12, 11]",
            r"modules\.language: layers_per_stage=\[9, 12, 11\] must be an even split",
        ),
        ("schedule: {kind: 1f1b}", "schedule: {kind: colocated}", r"encoder_group=16 must be 1"),
        ("world_size: 16", "world_size: 18", r"world_size=18 must be 16, the ranks that host"),
    ],
)
def test_mimo_refuses_what_its_example_cannot_run(change, to, message):
    with pytest.raises(PlanError, match=message):
        emitted("mimo", SEQUENCE_PARALLEL.replace(change, to))
