"""Fits to times that a known GPU would give, with and without noise."""

from itertools import product

import numpy as np
import pytest

from megatron_mosaic.cluster.cluster_file import load_gpu
from megatron_mosaic.cluster.spec import SharingCurves
from megatron_mosaic.cost.spatial import rate_share, slowdowns
from megatron_mosaic.profile.measurements import TimedOperation
from megatron_mosaic.profile.sharing_fit import (
    TimedPair,
    TimedPart,
    demands_of,
    density_error,
    fit_interference,
    fit_knee,
    fit_rates,
    fit_sharing,
    kind_of,
)
from tests.cost.stair import static_grid_rate

SMS = 132
COUNTS = (*range(8, 132, 8), SMS)
TRUTH = SharingCurves(bandwidth_knee=0.55, interference=0.3)
# FLOPs or bytes per second on the whole GPU, and the time that each operation takes besides.
RATES = {"matmul.bf16": (6.4e14, 3e-6), "elementwise": (3.4e12, 3e-6)}
SIZES = {"matmul.bf16": (1e9, 1e10, 1e11), "elementwise": (1e7, 1e8, 1e9)}


def timed_parts(truth=TRUTH, *, noise=0.0, rates=RATES):
    random = np.random.default_rng(0)
    parts = []
    for curve, (rate, fixed_s) in rates.items():
        for size, sms in product(SIZES[curve], COUNTS):
            share = rate_share(truth, curve, sms=sms, num_sms=SMS)
            seconds = (fixed_s + size / (rate * share)) * np.exp(noise * random.standard_normal())
            parts.append(TimedPart(TimedOperation(curve, size, float(seconds)), sms))
    return parts


def timed_pairs(truth=TRUTH, *, noise=0.0):
    """Operations that take none, some, much or all of the bandwidth, on three splits."""
    random, most, pairs = np.random.default_rng(1), 3.4e12, []
    for split in ((32, 100), (64, 68), (100, 32)):
        reached = [rate_share(truth, "elementwise", sms=sms, num_sms=SMS) for sms in split]
        for asked in product((0.05, 0.4, 0.8, 1.0), repeat=2):
            moved = asked[0] * reached[0] * most, asked[1] * reached[1] * most
            pair = TimedPair(("a", "b"), split, moved, (1.0, 1.0), (1.0, 1.0))
            demands = demands_of(pair, truth, num_sms=SMS, most=most)
            slower = slowdowns(demands, (1.0, 1.0), interference=truth.interference)
            beside = np.array(slower) * np.exp(noise * random.standard_normal(2))
            pairs.append(pair._replace(beside_s=tuple(beside.tolist())))
    return pairs


def test_fit_recovers_what_the_times_were_made_of():
    found = fit_sharing(timed_parts(), timed_pairs(), num_sms=SMS, source="made up")

    assert found.curves.bandwidth_knee == pytest.approx(0.55, rel=0.01)
    assert found.curves.interference == pytest.approx(0.3, rel=0.02)
    for curve, kind in (("matmul.bf16", "matmul"), ("elementwise", "elementwise")):
        for sms in COUNTS:
            expected = rate_share(TRUTH, curve, sms=sms, num_sms=SMS)
            assert found.curves.rates[kind][sms] == pytest.approx(expected, rel=0.02)
    assert found.rate_errors[1] < 0.02
    assert found.pair_error == pytest.approx(0.0, abs=0.005)


def test_fit_of_noisy_times_is_as_good_as_they_are():
    found = fit_sharing(
        timed_parts(noise=0.03), timed_pairs(noise=0.03), num_sms=SMS, source="made up"
    )

    assert found.curves.bandwidth_knee == pytest.approx(0.55, rel=0.05)
    assert found.curves.interference == pytest.approx(0.3, rel=0.2)
    # The mean distance of two times of noise 3 % each: 0.03 * sqrt(2) * sqrt(2 / pi) = 3.4 %.
    assert found.rate_errors[1] == pytest.approx(0.034, abs=0.015)
    # And of one: 0.03 * sqrt(2 / pi) = 2.4 %.
    assert found.pair_error == pytest.approx(0.024, abs=0.006)


def test_thinner_tables_of_a_stair_are_worse():
    # Grids of a block for each multiprocessor: steps, of which a thin table misses some.
    stair = {sms: static_grid_rate(sms, num_sms=SMS) for sms in COUNTS}
    truth = SharingCurves(bandwidth_knee=0.55, interference=0.0, rates={"matmul": stair})

    errors = [density_error(timed_parts(truth), num_sms=SMS, every=every) for every in (1, 2, 4)]

    assert errors[1] < errors[2]
    assert 0.02 < errors[0] < errors[2]


def test_table_holds_a_stair_exactly():
    stair = {sms: static_grid_rate(sms, num_sms=SMS) for sms in COUNTS}
    truth = SharingCurves(bandwidth_knee=0.55, interference=0.0, rates={"matmul": stair})

    assert fit_rates(timed_parts(truth), num_sms=SMS)["matmul"] == pytest.approx(stair, rel=0.02)


def test_noise_does_not_make_more_multiprocessors_slower():
    rates = fit_rates(timed_parts(noise=0.2), num_sms=SMS)

    for own in rates.values():
        assert list(own.values()) == sorted(own.values())
        assert own[SMS] == 1.0


def test_launch_does_not_count_as_rate():
    # Most of the smaller operations' times are launches.
    rates = {"matmul.bf16": (6.4e14, 1e-4), "elementwise": (3.4e12, 1e-4)}

    found = fit_rates(timed_parts(rates=rates), num_sms=SMS)
    assert found["matmul"][64] == pytest.approx(64 / 132, rel=0.02)
    assert found["elementwise"][32] == pytest.approx(32 / 132 / 0.55, rel=0.02)


def test_no_pairs_say_nothing_of_interference():
    found = fit_sharing(timed_parts(), [], num_sms=SMS, source="made up")

    assert found.curves.interference == 0.0
    assert found.pair_error is None


@pytest.mark.parametrize("knee", [0.25, 0.4, 0.55, 0.75, 1.0])
def test_knee_is_where_rates_cease_to_rise(knee):
    rates = {sms: min(1.0, sms / SMS / knee) for sms in COUNTS}

    assert fit_knee(rates, num_sms=SMS) == pytest.approx(knee, rel=0.01)


def test_interference_of_pairs_that_do_not_mind_is_none():
    quiet = SharingCurves(bandwidth_knee=0.55, interference=0.0)
    known = [
        (pair, demands_of(pair, quiet, num_sms=SMS, most=3.4e12)) for pair in timed_pairs(quiet)
    ]

    assert fit_interference(known) == pytest.approx(0.0, abs=1e-3)


def test_kinds_leave_precisions_away_and_passes_not():
    curves = ("matmul.bf16", "weight_gradient.matmul.fp8", "attention.forward", "elementwise")
    kinds = ["matmul", "weight_gradient.matmul", "attention.forward", "elementwise"]
    assert [kind_of(curve) for curve in curves] == kinds
    assert {kind_of(curve) for curve in load_gpu("h200").curves} >= set(kinds) - {kinds[1]}
