from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_mosaic.model.distribution_file import read_distribution, write_distribution
from megatron_mosaic.model.tokens import Distribution


def read(value, folder=Path()):
    return read_distribution("tokens", value, folder=folder)


def test_number_and_mean_are_constant():
    assert read(576) == read({"mean": 576}) == Distribution.constant(576)


def test_shares_percents_and_counts_mean_the_same():
    expected = Distribution((256, 1024), (0.25, 0.75))

    assert read({"histogram": {1024: 0.75, 256: 0.25}}) == expected
    assert read({"histogram": {256: 25, 1024: 75}}) == expected
    assert read({"counts": {256: 2, 1024: 6, 4096: 0}}) == expected


def test_rounded_shares_add_up():
    thirds = read({"histogram": {1: 33.3, 2: 33.3, 3: 33.3}})

    assert sum(thirds.shares) == pytest.approx(1, abs=1e-12)
    assert thirds.mean == pytest.approx(2)


@pytest.mark.parametrize(
    "text", ["value,share\n256,0.25\n1024,0.75\n", "value,count\n1024,3\n256,1\n"]
)
def test_histogram_file_stands_beside_the_model(text, tmp_path):
    (tmp_path / "tokens.csv").write_text(text)

    assert read({"histogram": "tokens.csv"}, tmp_path) == Distribution((256, 1024), (0.25, 0.75))


def test_percentiles_are_spread_evenly_between_points():
    spread = read({"percentiles": {0: 0, 100: 300}})

    # Uniform on 0..300: mean 150, mean square 300^2 / 3, and the ends occur.
    assert spread.mean == pytest.approx(150)
    assert spread.mean_square == pytest.approx(30_000)
    assert (spread.values[0], spread.largest) == (0, 300)


def test_percentiles_outside_the_points_are_the_nearest_one():
    # A tenth is 100 and a tenth is 500; between them the values are spread: mean 300.
    spread = read({"percentiles": {10: 100, 90: 500}})

    assert spread.mean == pytest.approx(0.1 * 100 + 0.8 * 300 + 0.1 * 500)
    assert spread.largest == 500


def test_median_and_tail_of_percentiles_are_kept():
    spread = read({"percentiles": {0: 64, 50: 256, 90: 1024, 100: 4096}})

    # 0.5 * 160 + 0.4 * 640 + 0.1 * 2560
    assert spread.mean == pytest.approx(592)
    assert spread.percentile(0.5) == 256
    assert spread.percentile(0.9) == 1024


@given(st.dictionaries(st.integers(0, 10_000), st.floats(0.01, 100), min_size=1, max_size=8))
def test_any_distribution_survives_being_written(weights):
    distribution = Distribution.of_weights(list(weights), list(weights.values()))

    again = read(write_distribution(distribution))

    assert again.values == distribution.values
    assert again.shares == pytest.approx(distribution.shares)
