"""Which quotas of multiprocessors (SMs) a GPU can give to lanes, and the split that gives them.

A driver splits a GPU into equal groups and a remainder; a lane has some of the groups, or the
remainder. Lanes of one split never share an SM.
"""

from collections.abc import Iterator, Sequence
from math import gcd
from typing import NamedTuple

from megatron_mosaic.errors import LayoutError

REMAINDER = -1
"""Place of what a split leaves over: the last one, after its groups."""


class Granularity(NamedTuple):
    """Sizes that a group of SMs can have.

    Args:
        least: SMs of the smallest group.
        multiple: Every group has a multiple of it.
    """

    least: int
    multiple: int


class SmSplit(NamedTuple):
    """One split of a GPU, and what each lane has of it.

    Args:
        num_groups: Groups to ask for; with 0 nothing is split.
        group_sms: SMs of each.
        parts: For every lane the places in ``[*groups, remainder]`` that are its own; none is
            the whole GPU.
    """

    num_groups: int
    group_sms: int
    parts: tuple[tuple[int, ...], ...]


# Least and multiple by major compute capability, without flags. From 9 on clusters of thread
# blocks need SMs that are scheduled together, which is why it is coarser there.
# Source: CUDA driver API 12.4 and later, "Green Contexts", cuDevSmResourceSplitByCount,
# https://docs.nvidia.com/cuda/cuda-driver-api/group__CUDA__GREEN__CONTEXTS.html
_GRANULARITY = {6: Granularity(1, 1), 7: Granularity(2, 2), 8: Granularity(4, 2)}
_GRANULARITY_SINCE_9 = Granularity(8, 8)


def granularity(compute_capability: tuple[int, int]) -> Granularity:
    """Sizes of groups of SMs by what a GPU can compute; a device itself has the last word.

    Args:
        compute_capability: Major and minor, as torch gives them: ``(9, 0)`` for an H200.

    Raises:
        LayoutError: The GPU is older than green contexts.
    """
    major, minor = compute_capability
    if major < min(_GRANULARITY):
        raise LayoutError(
            f"compute_capability={major}.{minor} must be >= 6.0 for SM quotas; remove share"
        )
    return _GRANULARITY.get(major, _GRANULARITY_SINCE_9)


def quotas(num_sms: int, *, compute_capability: tuple[int, int]) -> tuple[int, ...]:
    """Every quota that a lane can have, ascending: groups, and what they leave over."""
    return _legal(num_sms, granularity(compute_capability))


def _legal(num_sms: int, sizes: Granularity) -> tuple[int, ...]:
    groups = range(_up(sizes.least, sizes.multiple), num_sms, sizes.multiple)
    rest = (num_sms - sms for sms in groups if num_sms - sms >= sizes.least)
    return tuple(sorted({*groups, *rest}))


def partitions(
    num_sms: int, *, compute_capability: tuple[int, int], num_lanes: int
) -> Iterator[tuple[int, ...]]:
    """Yields all ways to deal the SMs of a GPU to lanes without rest, in ascending order.

    All lanes but the last have groups; the last has the remainder, so that a GPU whose SMs are
    no multiple has none left idle. From three lanes on groups are combined, and each is of the
    least size or a multiple of it.

    Args:
        num_sms: SMs of the GPU.
        compute_capability: Major and minor.
        num_lanes: Lanes that have a quota.
    """
    sizes = granularity(compute_capability)
    least = _up(sizes.least, sizes.multiple)
    step = sizes.multiple if num_lanes == 2 else least
    return _dealt(num_sms, num_lanes, range(least, num_sms, step), sizes.least)


def _dealt(num_sms: int, num_lanes: int, groups: range, least: int) -> Iterator[tuple[int, ...]]:
    if num_lanes == 1:
        yield (num_sms,)
        return
    for sms in groups:
        if num_sms - sms < least * (num_lanes - 1):
            return
        for others in _dealt(num_sms - sms, num_lanes - 1, groups, least):
            yield (sms, *others)


def split_for(
    lanes: Sequence[int | None], *, num_sms: int, sizes: Granularity, where: str
) -> SmSplit:
    """Finds the one split that gives every lane its quota.

    At most one lane has the remainder: the one whose quota no groups make up, else the largest
    if quotas use up the GPU. The groups of all others are as large as their quotas allow.

    Args:
        lanes: Quotas of lanes; None is a lane that uses the whole GPU, other lanes' SMs too.
        num_sms: SMs of the GPU.
        sizes: What its groups can be.
        where: The device, for messages.

    Raises:
        LayoutError: A quota is none that the device has, all together are more than it has, or
            they cannot be had at once.
    """
    asked = {lane: sms for lane, sms in enumerate(lanes) if sms is not None}
    if not asked:
        return SmSplit(0, 0, ((),) * len(lanes))
    for sms in asked.values():
        _check(sms, num_sms, sizes, where)
    shown = " | ".join(str(sms) for sms in asked.values())
    rest = _rest_lane(asked, num_sms, sizes, f"{where}: share.sms={shown}")
    grouped = {lane: sms for lane, sms in asked.items() if lane != rest}
    total = sum(grouped.values()) if rest is None else num_sms - asked[rest]
    group_sms = gcd(total, *grouped.values())
    if group_sms < sizes.least:
        raise LayoutError(
            f"{where}: share.sms={shown} must have groups of >= {sizes.least} SMs in common, not "
            f"{group_sms}; use multiples of {sizes.least}"
        )
    parts: list[tuple[int, ...]] = [()] * len(lanes)
    first = 0
    for lane, sms in grouped.items():
        parts[lane] = tuple(range(first, first + sms // group_sms))
        first += sms // group_sms
    if rest is not None:
        parts[rest] = (REMAINDER,)
    return SmSplit(total // group_sms, group_sms, tuple(parts))


def _check(sms: int, num_sms: int, sizes: Granularity, where: str) -> None:
    legal = _legal(num_sms, sizes)
    if sms in legal:
        return
    below = [quota for quota in legal if quota < sms][-1:]
    above = [quota for quota in legal if quota > sms][:1]
    near = " or ".join(map(str, below + above)) or "no share"
    raise LayoutError(
        f"{where}: share.sms={sms} must be a group of >= {sizes.least} SMs in multiples of "
        f"{sizes.multiple}, or what such a group leaves of {num_sms}; use {near}"
    )


def _rest_lane(asked: dict[int, int], num_sms: int, sizes: Granularity, where: str) -> int | None:
    """Lane that has the remainder of the split, if one must or can."""
    total = sum(asked.values())
    if total > num_sms:
        raise LayoutError(f"{where} must add up to <= {num_sms} SMs, not {total}; lower one")
    odd = [lane for lane, sms in asked.items() if sms % sizes.multiple]
    if len(odd) > 1:
        raise LayoutError(
            f"{where} must be multiples of {sizes.multiple} but for one, which has the rest; "
            f"use {asked[odd[0]] // sizes.multiple * sizes.multiple} for {asked[odd[0]]}"
        )
    if odd:
        return odd[0]
    if total < num_sms:
        return None
    # A quota that groups of the least size cannot make up, else what spares the most groups.
    return max(asked, key=lambda lane: (asked[lane] % sizes.least > 0, asked[lane], lane))


def _up(sms: int, multiple: int) -> int:
    return -(-sms // multiple) * multiple
