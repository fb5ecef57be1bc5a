import pytest

from megatron_mosaic.cluster.spec import Curve
from megatron_mosaic.profile.fit import fit_link, fit_rate, link_error
from megatron_mosaic.profile.measurements import TimedMessage, TimedOperation


def _operations(limit_per_s, half_size, sizes, noise=(1.0,)):
    return [
        TimedOperation(
            "matmul.bf16", size, (size + half_size) / limit_per_s * noise[i % len(noise)]
        )
        for i, size in enumerate(sizes)
    ]


def _messages(latency_s, bandwidth_bytes_per_s, noise=(1.0,)):
    ring = [
        TimedMessage("near", collective, steps, moved_bytes, 0.0)
        for collective, steps in (("all-reduce", 14), ("all-gather", 7), ("send", 1))
        for moved_bytes in (1e3, 1e6, 1e9)
    ]
    return [
        it._replace(
            seconds=(it.steps * latency_s + it.moved_bytes / bandwidth_bytes_per_s)
            * noise[i % len(noise)]
        )
        for i, it in enumerate(ring)
    ]


def test_rate_is_recovered_from_exact_times():
    found = fit_rate(_operations(700e12, 2e9, [1e7, 1e9, 1e11, 1e13]))

    assert found.limit_per_s == pytest.approx(700e12, rel=1e-3)
    assert found.half_size == pytest.approx(2e9, rel=1e-3)
    assert found.error == pytest.approx(0, abs=1e-6)


def test_rate_is_recovered_within_the_noise():
    noise = (1.04, 0.97, 1.02, 0.95, 1.0)

    found = fit_rate(_operations(700e12, 2e9, [10**power for power in range(7, 14)], noise))

    assert found.limit_per_s == pytest.approx(700e12, rel=0.05)
    assert found.half_size == pytest.approx(2e9, rel=0.1)
    assert 0 < found.error < 0.05


def _narrow(limit_per_s, half_size, half_dim, noise=(1.0,)):
    shapes = [(n, n) for n in (256, 1024, 4096)] + [(m, 4096) for m in (16, 64, 512)]
    times = []
    for i, (rows, wide) in enumerate(shapes):
        size = 2 * rows * wide**2
        seconds = (size + half_size) / limit_per_s * (rows + half_dim) / rows
        times.append(TimedOperation("matmul.bf16", size, seconds * noise[i % len(noise)], rows))
    return times


def test_rate_of_narrow_multiplications_is_recovered_from_exact_times():
    found = fit_rate(_narrow(700e12, 2e9, 120.0))

    assert found[:3] == pytest.approx((700e12, 2e9, 120.0), rel=1e-3)


def test_rate_of_narrow_multiplications_is_recovered_within_the_noise():
    timed = _narrow(700e12, 2e9, 120.0, noise=(1.03, 0.98, 1.0, 0.97))

    found = fit_rate(timed)

    assert found[:3] == pytest.approx((700e12, 2e9, 120.0), rel=0.15)
    assert 0 < found.error < 0.05


def test_fitted_rate_is_the_share_that_a_curve_of_it_tells():
    timed = _narrow(700e12, 2e9, 120.0)
    found = fit_rate(timed)
    curve = Curve(peak_share=0.7, half_size=found.half_size, half_dim=found.half_dim)

    for it in timed:
        share = curve.share(it.size, smallest=it.smallest)
        assert it.size / (1000e12 * share) == pytest.approx(it.seconds, rel=2e-3)


def test_rate_without_a_fixed_cost_has_no_half_size():
    found = fit_rate(_operations(3e12, 0.0, [1e6, 1e8]))

    assert found.limit_per_s == pytest.approx(3e12, rel=1e-3)
    assert found.half_size == pytest.approx(0, abs=1e-3)


def test_limit_that_the_sizes_do_not_show_is_twice_the_fastest():
    found = fit_rate([TimedOperation("elementwise", size, 1e-3) for size in (1e3, 2e3, 4e3)])

    # The times do not grow; the fastest are 4e3 bytes in a millisecond.
    assert found.limit_per_s == pytest.approx(8e6)


def test_rate_that_one_measurement_contradicts_is_that_of_the_others():
    timed = _operations(700e12, 2e9, [10**power for power in range(7, 14)])
    timed[3] = timed[3]._replace(seconds=3 * timed[3].seconds)

    found = fit_rate(timed)

    assert found.limit_per_s == pytest.approx(700e12, rel=0.05)
    assert found.half_size == pytest.approx(2e9, rel=0.15)


def test_link_is_recovered_from_exact_times_of_unlike_collectives():
    found = fit_link(_messages(5e-6, 400e9))

    assert found.latency_s == pytest.approx(5e-6, rel=1e-3)
    assert found.bandwidth_bytes_per_s == pytest.approx(400e9, rel=1e-3)


def test_link_is_recovered_within_the_noise():
    messages = _messages(5e-6, 400e9, noise=(1.05, 0.96, 1.0, 0.98))

    found = fit_link(messages)

    assert found.latency_s == pytest.approx(5e-6, rel=0.06)
    assert found.bandwidth_bytes_per_s == pytest.approx(400e9, rel=0.06)
    assert link_error(found, messages) == pytest.approx(found.error, rel=0.05)
