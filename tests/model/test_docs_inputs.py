import re
from pathlib import Path

import pytest
import yaml

import megatron_mosaic
from megatron_mosaic.cluster.cluster_file import parse_cluster
from megatron_mosaic.model.huggingface import SUPPORTED
from megatron_mosaic.model.model_file import model_from_document, parse_model

DOC = (Path(__file__).parents[2] / "docs" / "inputs.md").read_text()
MODEL, MASK, CLUSTER, SHARING = re.findall(r"```yaml\n(.*?)```", DOC, flags=re.DOTALL)


def test_model_of_the_docs_is_read():
    model = parse_model(MODEL, where="docs")

    vision = model.modules["vision"]
    # 120 of 1000 samples have no image, 850 one, 30 four.
    assert vision.items_per_sample.mean == pytest.approx(0.97)
    assert vision.trainable == ("projector",)
    assert model.language.num_layers == 24


def test_mask_of_the_docs_is_read():
    document = yaml.safe_load(MODEL)
    document["modules"]["language"] |= yaml.safe_load(MASK)
    language = model_from_document(document).language

    assert language.mask == "multimodal_packed"
    assert language.tokens_per_document.percentile(0.5) == 2400


def test_cluster_of_the_docs_is_read():
    cluster = parse_cluster(CLUSTER, where="docs")

    assert cluster.num_gpus == 32
    assert [cluster.tier(span).name for span in (8, 16)] == ["NVLink", "RoCE"]


def test_sharing_of_the_docs_is_read():
    folder = Path(megatron_mosaic.__file__).parent / "cluster" / "gpus"
    gpu = yaml.safe_load((folder / "h100.yaml").read_text()) | yaml.safe_load(SHARING)
    cluster = yaml.safe_load(CLUSTER) | {"gpu": {k: v for k, v in gpu.items() if k != "format"}}

    read = parse_cluster(yaml.safe_dump(cluster), where="docs").gpu

    assert read.compute_capability == (9, 0)
    assert read.sharing is not None
    assert read.sharing.bandwidth_knee == 0.575
    assert read.sharing.rates == {"matmul": {32: 0.25, 64: 0.49}}


def test_docs_list_what_can_be_imported():
    listed = DOC.split("## From Hugging Face")[1].split("## What is not")[0]

    # Parts of vision-language models have types of their own, which no file begins with.
    whole = {kind for kind in SUPPORTED if not kind.endswith("_text")}
    assert set(re.findall(r"`([a-z0-9_]+)`", listed)) - {"model_type"} == whole
