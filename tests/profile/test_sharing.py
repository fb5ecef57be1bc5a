"""What is timed on parts of a device; a host's lanes take turns, and have no quotas."""

from contextlib import contextmanager
from dataclasses import replace
from itertools import product

import pytest
import torch

from megatron_mosaic.cli import main
from megatron_mosaic.cluster.cluster_file import parse_cluster, write_cluster
from megatron_mosaic.cluster.shipped import load_cluster
from megatron_mosaic.cluster.spec import SharingCurves
from megatron_mosaic.errors import HostError, LayoutError
from megatron_mosaic.profile import sharing
from megatron_mosaic.profile.operations import Operation, Sizes
from megatron_mosaic.profile.sharing import CURVES, time_pairs, time_parts
from megatron_mosaic.profile.sharing_fit import FittedSharing, fit_sharing
from megatron_mosaic.profile.sharing_result import (
    MeasuredSharing,
    check_device,
    check_environment,
    grid,
    report,
    splits_of,
    with_sharing,
)
from megatron_mosaic.profile.timing import Stopwatch
from megatron_mosaic.schedule.races import VectorClocks
from megatron_mosaic.sharing.virtual import VirtualLane, virtual_lanes

TINY = Sizes(
    square=(16, 32), rows=(4,), wide=(16,), experts=2, sequence=(8, 16), heads=2,
    values=(2**8, 2**10, 2**12),
)  # fmt: skip
STOPWATCH = Stopwatch(device=torch.device("cpu"), budget_s=1e-4)
FITTED = FittedSharing(
    curves=SharingCurves(
        bandwidth_knee=0.6, interference=0.2, rates={"matmul": {64: 0.5, 132: 1.0}}, source="here"
    ),
    rate_errors={1: 0.01, 2: 0.02, 4: 0.04},
    pair_error=0.05,
)


def test_every_kind_is_timed_on_every_quota_and_on_all():
    parts = list(time_parts(STOPWATCH, TINY, (8, 16), num_sms=32, open_lanes=virtual_lanes))

    # Two square multiplications, two attentions forward and backward, three elementwise.
    assert len(parts) == 9 * 3
    assert {(part.operation.curve, part.sms) for part in parts} == set(product(CURVES, (8, 16, 32)))
    assert all(part.operation.seconds > 0 for part in parts)


def test_largest_of_each_kind_is_timed_beside_every_kind():
    pairs = list(time_pairs(STOPWATCH, TINY, [(8, 24)], open_lanes=virtual_lanes))

    assert [pair.names for pair in pairs] == list(product(CURVES, repeat=2))
    assert all(min(*pair.alone_s, *pair.beside_s) > 0 for pair in pairs)
    first = pairs[0]
    # Three matrices of 32 x 32 values of 2 bytes.
    assert first.moved_bytes == (6144, 6144)
    # Query, key, value and output of 16 tokens, 2 heads of 128 values of 2 bytes.
    assert pairs[1].moved_bytes == (6144, 4 * 16 * 2 * 128 * 2)


class NotedLane(VirtualLane):
    """Notes in which lane, and with which quota, work is launched."""

    current: tuple[str, int | None] = ("", None)

    @contextmanager
    def active(self, *, whole=False):
        before, NotedLane.current = NotedLane.current, (self.name, self.sms)
        with super().active(whole=whole):
            yield
        NotedLane.current = before


def test_operations_are_prepared_in_the_lane_in_which_they_are_timed(monkeypatch):
    ran = []

    def prepare():
        prepared = NotedLane.current
        return lambda: ran.append((prepared, NotedLane.current))

    def open_lanes(quotas):
        lanes = virtual_lanes(quotas)
        clocks = VectorClocks()
        named = {quota.lane: NotedLane(quota, clocks=clocks) for quota in quotas}
        return replace(lanes, named=named)

    operation = Operation("elementwise", 2**10, prepare)
    monkeypatch.setattr(sharing, "operations", lambda device, sizes: [operation])

    list(time_parts(STOPWATCH, TINY, (8, 16), num_sms=32, open_lanes=open_lanes))
    list(time_pairs(STOPWATCH, TINY, [(8, 24)], open_lanes=open_lanes))

    # Autograd runs a backward pass where its forward pass ran.
    assert all(prepared == launched for prepared, launched in ran)
    assert {launched for _, launched in ran} == {
        ("first", 8),
        ("first", 16),
        ("second", 24),
        ("first", None),
    }


def test_what_is_timed_can_be_fitted():
    parts = list(time_parts(STOPWATCH, TINY, (8, 16), num_sms=32, open_lanes=virtual_lanes))
    pairs = list(time_pairs(STOPWATCH, TINY, [(8, 24)], open_lanes=virtual_lanes))

    found = fit_sharing(parts, pairs, num_sms=32, source="a host")

    assert set(found.curves.rates) == {"matmul", *CURVES[1:]}
    assert set(found.rate_errors) == {1, 2, 4}


def test_grid_is_every_group_that_the_gpu_can_make():
    # An H200: 8, 16, ... 128 of 132. An A100: groups of 4 in steps of 2, of 108.
    assert grid(132, (9, 0), quick=False) == list(range(8, 132, 8))
    assert grid(132, (9, 0), quick=True) == [8, 40, 72, 104]
    assert grid(108, (8, 0), quick=False) == list(range(4, 108, 2))


def test_splits_are_a_quarter_a_half_and_three_quarters():
    # Of 132: 33, 66 and 99.
    assert splits_of(range(8, 132, 8), num_sms=132) == [(32, 100), (64, 68), (96, 36)]


def test_measured_curves_are_written_and_read_again():
    cluster = with_sharing(load_cluster("h200"), MeasuredSharing(FITTED, (9, 0)))

    again = parse_cluster(write_cluster(cluster), where="again")

    assert again.gpu.sharing == FITTED.curves
    assert again == cluster


def test_report_says_how_far_off_it_is():
    assert list(report(FITTED)) == [
        "bandwidth is full from 60% of the multiprocessors on",
        "interference 0.2",
        "matmul: 64: 0.5, 132: 1",
        "mean error of times, one number left out: 1.0%",
        "mean error of times, one of 2 numbers measured: 2.0%",
        "mean error of times, one of 4 numbers measured: 4.0%",
        "mean error beside others, each pair left out in turn: 5.0%",
    ]


def test_another_gpu_than_the_base_is_refused():
    with pytest.raises(LayoutError, match=r"gpu H200: num_sms=132 must be 108 as of the measured"):
        check_device(load_cluster("h200").gpu, num_sms=108)


def test_one_hardware_queue_is_refused():
    variables = {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}

    with pytest.raises(HostError, match=r"CUDA_DEVICE_MAX_CONNECTIONS=1 must be > 1"):
        check_environment((9, 0), variables)
    check_environment((9, 0), {})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "profile: base must be given with --sharing"),
        (["--base", "h200", "--device", "cpu"], "device=cpu must not be given with --sharing"),
        (["--base", "h200", "--nproc", "2"], "nproc=2 must not be given with --sharing"),
        pytest.param(
            ["--base", "h200"],
            "device=cpu must be a GPU for --sharing",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_command_says_in_a_line_what_it_needs(arguments, message, tmp_path, capsys):
    code = main(["profile", str(tmp_path / "out.yaml"), "--sharing", *arguments])

    assert code != 0
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out.yaml").exists()
