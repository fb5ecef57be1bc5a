import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_mosaic.cluster.sm_partition import (
    REMAINDER,
    Granularity,
    SmSplit,
    granularity,
    partitions,
    quotas,
    split_for,
)
from megatron_mosaic.errors import LayoutError

H200 = (9, 0)
HOPPER = Granularity(8, 8)
AMPERE = Granularity(4, 2)

# SMs of shipped GPUs by compute capability: V100, T4, A100, L40S, H100 PCIe, H200, B200, RTX 5090.
DEVICES = [
    (80, (7, 0)),
    (40, (7, 5)),
    (108, (8, 0)),
    (142, (8, 9)),
    (114, (9, 0)),
    (132, (9, 0)),
    (148, (10, 0)),
    (170, (12, 0)),
]


def split(*lanes, num_sms=132, sizes=HOPPER):
    return split_for(lanes, num_sms=num_sms, sizes=sizes, where="H200")


@pytest.mark.parametrize(
    ("compute_capability", "least", "multiple"),
    [
        ((6, 1), 1, 1),
        ((7, 5), 2, 2),
        ((8, 9), 4, 2),
        ((9, 0), 8, 8),
        ((10, 0), 8, 8),
        ((12, 1), 8, 8),
    ],
)
def test_granularity_is_the_drivers(compute_capability, least, multiple):
    assert granularity(compute_capability) == (least, multiple)


def test_granularity_refuses_gpus_before_green_contexts():
    with pytest.raises(LayoutError, match=r"compute_capability=5\.2 must be >= 6\.0"):
        granularity((5, 2))


def test_quotas_of_h200_are_groups_and_what_they_leave():
    # Groups 8, 16, ..., 128, and 132 - 8 = 124, 132 - 16 = 116, ..., 132 - 120 = 12.
    legal = quotas(132, compute_capability=H200)

    assert legal == (*range(8, 128, 4), 128)


def test_two_lanes_of_h200_have_fifteen_partitions():
    found = list(partitions(132, compute_capability=H200, num_lanes=2))

    assert found == [(8 * k, 132 - 8 * k) for k in range(1, 16)]


def test_three_lanes_of_a_small_gpu_have_every_deal():
    # 36 SMs in groups of 8: three groups at most for two lanes, and the last lane has the rest.
    assert list(partitions(36, compute_capability=H200, num_lanes=3)) == [
        (8, 8, 20),
        (8, 16, 12),
        (16, 8, 12),
    ]


def test_one_lane_has_the_whole_gpu():
    assert list(partitions(132, compute_capability=H200, num_lanes=1)) == [(132,)]


def test_more_lanes_than_groups_have_no_partition():
    assert list(partitions(20, compute_capability=H200, num_lanes=3)) == []


@pytest.mark.parametrize(
    ("lanes", "expected"),
    [
        # Quotas that use up the GPU: one group, and the larger lane has the remainder.
        ((32, 100), SmSplit(1, 32, ((0,), (REMAINDER,)))),
        ((64, 68), SmSplit(1, 64, ((0,), (REMAINDER,)))),
        ((100, 32), SmSplit(1, 32, ((REMAINDER,), (0,)))),
        # The lane whose quota is no multiple of 8 has the remainder, also where it is small.
        ((120, 12), SmSplit(1, 120, ((0,), (REMAINDER,)))),
        # An uncapped lane has no part of the split.
        ((32, None), SmSplit(1, 32, ((0,), ()))),
        ((100, None), SmSplit(1, 32, ((REMAINDER,), ()))),
        ((None, None), SmSplit(0, 0, ((), ()))),
        # Groups as large as all quotas allow.
        ((32, 32, 68), SmSplit(2, 32, ((0,), (1,), (REMAINDER,)))),
        ((8, 32, 92), SmSplit(5, 8, ((0,), (1, 2, 3, 4), (REMAINDER,)))),
        ((32, 48, None), SmSplit(5, 16, ((0, 1), (2, 3, 4), ()))),
        ((32, 32, 32, 36), SmSplit(3, 32, ((0,), (1,), (2,), (REMAINDER,)))),
        # 132 - 28 = 104 SMs in 13 groups, of which 11 stay idle.
        ((16, 28), SmSplit(13, 8, ((0, 1), (REMAINDER,)))),
    ],
)
def test_split_gives_lanes_their_quotas(lanes, expected):
    assert split(*lanes) == expected


def test_split_of_a_gpu_without_rest_gives_the_largest_lane_the_remainder():
    assert split(40, 88, num_sms=128) == SmSplit(1, 40, ((0,), (REMAINDER,)))


def test_split_before_hopper_takes_quotas_in_twos():
    assert split(6, 102, num_sms=108, sizes=AMPERE) == SmSplit(1, 6, ((0,), (REMAINDER,)))


@pytest.mark.parametrize(
    ("lanes", "message"),
    [
        ((33, None), r"H200: share\.sms=33 must be .* >= 8 .* multiples of 8.*; use 32 or 36"),
        ((4, None), r"share\.sms=4 must .*; use 8"),
        ((132, None), r"share\.sms=132 must .*; use 128"),
        ((64, 72), r"share\.sms=64 \| 72 must add up to <= 132 SMs, not 136; lower one"),
        ((12, 20), r"share\.sms=12 \| 20 must be multiples of 8 but for one.*; use 8 for 12"),
    ],
)
def test_split_refuses_what_a_gpu_cannot_give(lanes, message):
    with pytest.raises(LayoutError, match=message):
        split(*lanes)


def test_split_refuses_quotas_whose_common_groups_are_too_small():
    with pytest.raises(LayoutError, match=r"share\.sms=6 \| 10 must have groups of >= 4 .* not 2"):
        split(6, 10, None, num_sms=108, sizes=AMPERE)


def taken(found, num_sms):
    """SMs of every place of a split, as a driver would give them."""
    groups = [
        set(range(i * found.group_sms, (i + 1) * found.group_sms)) for i in range(found.num_groups)
    ]
    return [*groups, set(range(found.num_groups * found.group_sms, num_sms))]


@given(
    st.sampled_from(DEVICES), st.integers(2, 5), st.randoms(use_true_random=False), st.booleans()
)
def test_every_partition_can_be_split_into_disjoint_lanes(device, num_lanes, random, capped):
    num_sms, compute_capability = device
    sizes = granularity(compute_capability)
    deals = partitions(num_sms, compute_capability=compute_capability, num_lanes=num_lanes)
    deal = next(deal for deal in deals if random.random() < 0.05 or deal[0] > num_sms // 4)
    lanes = deal if capped else (*deal[:-1], None)

    found = split_for(lanes, num_sms=num_sms, sizes=sizes, where="GPU")

    places = taken(found, num_sms)
    own = [set().union(*(places[part] for part in parts)) for parts in found.parts]
    assert [len(sms) for sms in own] == [quota or 0 for quota in lanes]
    assert sum(map(len, own)) == len(set().union(*own))
    assert found.group_sms >= sizes.least
    assert found.group_sms % sizes.multiple == 0
    assert found.num_groups * found.group_sms <= num_sms


@given(st.sampled_from(DEVICES))
def test_every_quota_alone_can_be_split_off(device):
    num_sms, compute_capability = device
    sizes = granularity(compute_capability)

    for quota in quotas(num_sms, compute_capability=compute_capability):
        found = split_for((quota, None), num_sms=num_sms, sizes=sizes, where="GPU")
        assert sum(len(taken(found, num_sms)[part]) for part in found.parts[0]) == quota
