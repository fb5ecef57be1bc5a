"""Times operations on some of a GPU's multiprocessors, and beside others."""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import product

import torch

from megatron_mosaic.profile.measurements import TimedOperation
from megatron_mosaic.profile.operations import HEAD_SIZE, Operation, Sizes, operations
from megatron_mosaic.profile.sharing_fit import TimedPair, TimedPart
from megatron_mosaic.profile.timing import Run, Stopwatch
from megatron_mosaic.sharing.lane import Lane, Lanes, Quota

Open = Callable[[Sequence[Quota]], Lanes]
"""Opens lanes with quotas on the device that is measured."""

CURVES = ("matmul.bf16", "attention.forward", "attention.backward", "elementwise")
"""Kinds of operations that are measured; others go like these."""

_FIRST, _SECOND = "first", "second"
_IN_A_ROW = 10  # launches that are timed together
_LONGER = 3  # times as long as what is timed that the other lane is kept at work
_REPEATS = 7


def time_parts(
    stopwatch: Stopwatch, sizes: Sizes, counts: Sequence[int], *, num_sms: int, open_lanes: Open
) -> Iterator[TimedPart]:
    """Times operations of every kind on the whole device and on parts of it.

    Args:
        stopwatch: Of the device.
        sizes: How large the operations are.
        counts: Quotas, in multiprocessors.
        num_sms: Multiprocessors of the device.
        open_lanes: Opens lanes there.
    """
    for sms in (*counts, num_sms):
        lane = open_lanes([Quota(lane=_FIRST, sms=None if sms == num_sms else sms)]).named[_FIRST]
        for operation in _chosen(stopwatch.device, sizes):
            curve, size, _, smallest = operation
            seconds = _alone_s(stopwatch, _prepared(operation, lane), lane)
            yield TimedPart(TimedOperation(curve, size, seconds, smallest), sms)
        torch.cuda.empty_cache()  # the allocator keeps what it has for every lane apart


def _chosen(device: torch.device, sizes: Sizes) -> Iterator[Operation]:
    """Operations of the measured kinds; narrow multiplications are left to memory."""
    for operation in operations(device, sizes):
        square = not operation.smallest or round(operation.smallest**3 * 2) == operation.size
        if operation.curve in CURVES and square:
            yield operation


def _prepared(operation: Operation, lane: Lane) -> Run:
    # A backward pass runs where its forward pass did: in the lane, both.
    with lane.active():
        return operation.prepare()


def _moved_bytes(operation: Operation, sizes: Sizes) -> float:
    """What the largest operation of its kind has to read and write, in 2 bytes a value."""
    match operation.curve:
        case "matmul.bf16":
            return 3 * 2 * operation.smallest**2
        case "elementwise":
            return operation.size
        case _:
            # Attention keeps the scores on the chip; backward it reads two more tensors and
            # writes three in place of one.
            tensors = 4 if operation.curve == "attention.forward" else 8
            return tensors * 2 * sizes.heads * HEAD_SIZE * max(sizes.sequence)


def time_pairs(
    stopwatch: Stopwatch, sizes: Sizes, splits: Sequence[tuple[int, int]], *, open_lanes: Open
) -> Iterator[TimedPair]:
    """Times the largest operation of each kind beside one of every kind.

    Args:
        stopwatch: Of the device.
        sizes: How large the operations are.
        splits: Quotas of both.
        open_lanes: Opens lanes on the device.
    """
    largest = {it.curve: it for it in _chosen(stopwatch.device, sizes)}
    for split in splits:
        quotas = [
            Quota(lane=name, sms=sms) for name, sms in zip((_FIRST, _SECOND), split, strict=True)
        ]
        named = open_lanes(quotas).named
        lanes = named[_FIRST], named[_SECOND]
        runs = [{curve: _prepared(it, lane) for curve, it in largest.items()} for lane in lanes]
        for first, second in product(largest, repeat=2):
            alone_s, beside_s = _time_pair(stopwatch, (runs[0][first], runs[1][second]), lanes)
            moved = [_moved_bytes(largest[curve], sizes) for curve in (first, second)]
            yield TimedPair((first, second), split, (moved[0], moved[1]), alone_s, beside_s)


def _time_pair(
    stopwatch: Stopwatch, runs: tuple[Run, Run], lanes: tuple[Lane, Lane]
) -> tuple[tuple[float, float], tuple[float, float]]:
    """Seconds of both in their lanes: alone, and each while the other is at work."""
    alone_s = _alone_s(stopwatch, runs[0], lanes[0]), _alone_s(stopwatch, runs[1], lanes[1])
    longer = _LONGER * _IN_A_ROW
    first_s = _beside_s(
        stopwatch.device, runs, lanes, num_other=round(longer * alone_s[0] / alone_s[1])
    )
    second_s = _beside_s(
        stopwatch.device,
        (runs[1], runs[0]),
        (lanes[1], lanes[0]),
        num_other=round(longer * alone_s[1] / alone_s[0]),
    )
    return alone_s, (first_s, second_s)


def _alone_s(stopwatch: Stopwatch, run: Run, lane: Lane) -> float:
    with lane.active():
        return stopwatch.median_s(run)


def _beside_s(
    device: torch.device, runs: tuple[Run, Run], lanes: tuple[Lane, Lane], *, num_other: int
) -> float:
    """Seconds of the first run while the second is at work, which begins before and ends after."""
    lead = max(1, num_other // _LONGER)
    taken_s = []
    for _ in range(_REPEATS):
        _synchronize(device)
        _repeat(lanes[1], runs[1], lead)
        elapsed_s = _timed(device, lanes[0], runs[0])
        _repeat(lanes[1], runs[1], max(0, num_other - lead))
        taken_s.append(elapsed_s() / _IN_A_ROW)
    return statistics.median(taken_s)


def _repeat(lane: Lane, run: Run, number: int) -> None:
    with lane.active():
        for _ in range(number):
            run()


def _timed(device: torch.device, lane: Lane, run: Run) -> Callable[[], float]:
    """Launches a row of runs in a lane; returns what waits for them and says how long they took."""
    if device.type != "cuda":
        start_s = time.perf_counter()
        _repeat(lane, run, _IN_A_ROW)
        taken_s = time.perf_counter() - start_s
        return lambda: taken_s
    with lane.active():
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        _repeat(lane, run, _IN_A_ROW)
        stop.record()

    def elapsed_s() -> float:
        torch.cuda.synchronize(device)
        return start.elapsed_time(stop) * 1e-3  # from ms

    return elapsed_s


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
