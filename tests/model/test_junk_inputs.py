"""Whatever stands in a file, reading it works or says in one line what is wrong."""

import copy
import json

import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_mosaic.cluster.cluster_file import parse_cluster, write_cluster
from megatron_mosaic.cluster.shipped import load_cluster
from megatron_mosaic.errors import LayoutError, PlanError
from megatron_mosaic.model.huggingface import huggingface_document
from megatron_mosaic.model.model_file import model_from_document, parse_model, write_model
from megatron_mosaic.model.shipped import load_model
from tests.model.test_huggingface import (
    DEEPSEEK_V3,
    GPT_OSS,
    INTERNVL,
    LLAVA,
    NEMOTRON,
    QWEN3_MOE,
    QWEN25_VL,
    QWEN35,
)

JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 10),
    st.integers(10**6, 10**9),
    st.floats(allow_nan=True),
    st.sampled_from(["", "7", "x", "1e3", "*", "\n"]),
    st.sampled_from([[], [1], ["x", "y"], [[]], {}, {"x": 1}, {1: 0.5}, {"repeat": 2}]),
)
MODELS = [
    yaml.safe_load(write_model(load_model(name)))
    for name in ("llava-1.5-7b", "deepseek-v3", "qwen3.6-35b-a3b", "nemotron-3-nano-30b-a3b")
]
CLUSTER = yaml.safe_load(write_cluster(load_cluster("h100")))
CONFIGS = [DEEPSEEK_V3, GPT_OSS, INTERNVL, LLAVA, NEMOTRON, QWEN25_VL, QWEN3_MOE, QWEN35]
MANY = settings(max_examples=100, suppress_health_check=[HealthCheck.too_slow], deadline=None)


def places(document, path=()):
    """Every place of a document, as the keys and indices that lead there."""
    items = document.items() if isinstance(document, dict) else enumerate(document)
    for key, value in items:
        yield (*path, key)
        if isinstance(value, dict | list):
            yield from places(value, (*path, key))


@st.composite
def spoiled(draw, documents):
    """A document of which one place is junk, or missing."""
    document = copy.deepcopy(draw(st.sampled_from(documents)))
    *path, last = draw(st.sampled_from(list(places(document))))
    inner = document
    for key in path:
        inner = inner[key]
    if draw(st.booleans()):
        inner[last] = draw(JUNK)
    else:
        del inner[last]
    return document


def check(read, document):
    message = "it must be read; it is"
    try:
        read(document)
    except (PlanError, LayoutError) as error:
        message = str(error)
    assert len(message.splitlines()) == 1
    assert " must " in message
    assert "; " in message, "names no remedy"


@MANY
@given(spoiled(MODELS))
def test_spoiled_model_is_explained(document):
    check(lambda it: parse_model(yaml.safe_dump(it), where="junk"), document)


@MANY
@given(spoiled([CLUSTER]))
def test_spoiled_cluster_is_explained(document):
    check(lambda it: parse_cluster(yaml.safe_dump(it), where="junk"), document)


@MANY
@given(spoiled(CONFIGS))
def test_spoiled_config_is_explained(config):
    def read(it):
        config = json.loads(json.dumps(it))
        document = huggingface_document(config, name="junk", seq_length=4096, image_tokens=1024)
        return model_from_document(document)

    check(read, config)
