"""Published memory against the cost model's, with nothing fitted."""

import pytest

from benchmarks.memory_points import memory_rows, memory_summaries
from benchmarks.published_points import cases_of, read_points


@pytest.fixture(scope="module")
def rows():
    points = [point for point in read_points() if "_gib" in point.fields["metric"]]
    return memory_rows(cases_of(points)[0])


@pytest.mark.parametrize(
    ("metric", "tolerance"),
    [
        ("peak_alloc_gib", 0.01),  # SimuMax's own estimates are 1.38 % off at most
        ("param_opt_mem_gib", 0.001),  # layers alone; norms and biases are counted here too
        ("activation_mem_gib_no_recompute", 0.001),
        ("activation_mem_gib_seqpar_selective", 0.001),
    ],
)
def test_memory_is_the_published_one(rows, metric, tolerance):
    sources = ("simumax", "a100-2205.05198")
    errors = [row.error for row in rows if row.case.metric == metric and row.case.source in sources]

    assert len(errors) >= 2
    assert max(map(abs, errors)) < tolerance


def test_summaries_have_one_of_each_source_and_metric(rows):
    (found,) = (each for each in memory_summaries(rows) if each.source == "simumax")

    assert (found.metric, found.rows) == ("peak_alloc_gib", 27)
    assert found.mape < 0.005
