import re
from pathlib import Path

import pytest

from megatron_mosaic.errors import LayoutError, PlanError
from megatron_mosaic.model.shipped import load_model, shipped_models

BROKEN_MODELS = sorted((Path(__file__).parents[1] / "broken_models").glob("*.yaml"))


def test_broken_models_are_more_than_fifty():
    assert len(BROKEN_MODELS) >= 50


@pytest.mark.parametrize("path", BROKEN_MODELS, ids=lambda path: path.stem)
def test_broken_model_is_explained_in_one_line(path):
    expected = path.read_text().splitlines()[0].removeprefix("# expect: ")

    with pytest.raises((PlanError, LayoutError), match=expected) as caught:
        load_model(str(path))

    assert str(caught.value).startswith(f"{path}: ")
    assert len(str(caught.value).splitlines()) == 1
    assert re.search(r" must .*; \S", str(caught.value)), "names no remedy"


def test_missing_file_is_named():
    with pytest.raises(PlanError, match=r"^no\.yaml: file must be readable \(No such file"):
        load_model("no.yaml")


def test_unknown_name_has_the_nearest_one():
    with pytest.raises(PlanError, match=r"model='llama-3-8' must be .*; did you mean llama-3-8b\?"):
        load_model("llama-3-8")


def test_shipped_models_are_sorted():
    assert list(shipped_models()) == sorted(shipped_models())
