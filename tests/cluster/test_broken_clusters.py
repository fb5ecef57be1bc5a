import re
from pathlib import Path

import pytest

from megatron_mosaic.cluster.shipped import load_cluster
from megatron_mosaic.errors import LayoutError, PlanError

BROKEN_CLUSTERS = sorted((Path(__file__).parents[1] / "broken_clusters").glob("*.yaml"))


def test_broken_clusters_are_more_than_twenty():
    assert len(BROKEN_CLUSTERS) >= 20


@pytest.mark.parametrize("path", BROKEN_CLUSTERS, ids=lambda path: path.stem)
def test_broken_cluster_is_explained_in_one_line(path):
    expected = path.read_text().splitlines()[0].removeprefix("# expect: ")

    with pytest.raises((PlanError, LayoutError), match=expected) as caught:
        load_cluster(str(path))

    assert str(caught.value).startswith(f"{path}: ")
    assert len(str(caught.value).splitlines()) == 1
    assert re.search(r" must .*; \S", str(caught.value)), "names no remedy"


def test_missing_file_is_named():
    with pytest.raises(PlanError, match=r"^no\.yaml: file must be readable \(No such file"):
        load_cluster("no.yaml")


def test_unknown_name_has_the_nearest_one():
    with pytest.raises(PlanError, match=r"cluster='h10' must be .*; did you mean h100\?"):
        load_cluster("h10")
