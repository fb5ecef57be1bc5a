"""P2: operations beside each other on splits of the GPU, over what each takes alone there."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from typing import Any

from benchmarks.sharing.arms import FAILURES
from benchmarks.sharing.curves import IN_A_ROW, in_lane, lane_seconds, repeated_s
from benchmarks.sharing.lanes import LaneBank
from benchmarks.sharing.multiplexing import failure
from benchmarks.sharing.operations import Operation, operations
from benchmarks.sharing.setting import Budget, Setting, synchronize
from megatron_mosaic.sharing.lane import Lanes

LANES = ("first", "second")
SPLITS = ((32, 100), (64, 68), (100, 32))
"""Of an H200, in SMs."""

CHOSEN = ("gemm 8B s2048 up", "attention 1B s2048 both", "gelu 8B s8192")
"""One operation of each kind."""

LONGER = 3
"""Times as long as the timed lane that the other one is kept at work."""


def measure(setting: Setting) -> Iterator[dict[str, Any]]:
    """Measures all pairs of one operation of each kind on three splits."""
    budget, bank = Budget(seconds=setting.budget_s), LaneBank(setting)
    chosen = _chosen(setting)
    splits = setting.splits(2) if setting.tiny else SPLITS
    for split in splits:
        lanes: Lanes | str
        try:
            lanes = bank.lanes("green", dict(zip(LANES, split, strict=True)))
        except FAILURES as error:
            lanes = failure(error)
        for pair in product(chosen, repeat=2):
            row: dict[str, Any] = {
                "operations": [each.name for each in pair],
                "kinds": [each.kind for each in pair],
                "sms": list(split),
                "flops": [each.work.flops for each in pair],
                "bytes": [each.work.num_bytes for each in pair],
            }
            if isinstance(lanes, str):
                yield row | {"failed": lanes}
            elif budget.spent:
                yield row | {"skipped": budget.told()}
            else:
                yield row | measure_pair(pair, lanes, setting)


def _chosen(setting: Setting) -> list[Operation]:
    found = operations(setting)
    if not setting.tiny:
        return [each for each in found if each.name in CHOSEN]
    return list({each.kind: each for each in found}.values())


def measure_pair(pair: Sequence[Operation], lanes: Lanes, setting: Setting) -> dict[str, Any]:
    """Seconds of one launch of each, alone in its lane and while the other lane is at work."""
    runs = [each.run for each in pair]
    alone_s = [
        repeated_s(in_lane(lanes, {name: run}), setting)
        for name, run in zip(LANES, runs, strict=True)
    ]
    if setting.tiny:
        return {"solo_s": alone_s, "co_run_s": None, "needs": "a GPU, lanes of a host take turns"}
    beside_s = [
        _beside_s(lanes, runs, alone_s, timed=number, setting=setting) for number in range(2)
    ]
    return {"solo_s": alone_s, "co_run_s": beside_s}


def _beside_s(
    lanes: Lanes,
    runs: Sequence[Callable[[], Any]],
    alone_s: Sequence[float],
    *,
    timed: int,
    setting: Setting,
) -> float:
    """Median seconds of a launch in one lane; the other one begins before and ends after."""
    other = 1 - timed
    span_s = IN_A_ROW * alone_s[timed]
    num_other = max(1, round(LONGER * span_s / alone_s[other]))
    lead = max(1, num_other // LONGER)
    taken_s = []
    for _ in range(setting.warm_up + setting.rounds):
        synchronize(setting.device)
        begun = lanes.main.record()
        mine, theirs = lanes.named[LANES[timed]], lanes.named[LANES[other]]
        mine.wait(begun)
        theirs.wait(begun)
        lane_seconds(theirs, runs[other], times=lead)
        start, end = lane_seconds(mine, runs[timed], times=IN_A_ROW)
        lane_seconds(theirs, runs[other], times=num_other - lead)
        synchronize(setting.device)
        taken_s.append(start.elapsed_time(end) / 1e3 / IN_A_ROW)
    kept = sorted(taken_s[setting.warm_up :])
    return kept[len(kept) // 2]


def summary(row: Mapping[str, Any]) -> str:
    """One line while it runs."""
    told = row.get("skipped") or row.get("failed")
    if not told and row["co_run_s"]:
        ratios = [a / b for a, b in zip(row["co_run_s"], row["solo_s"], strict=True)]
        told = " and ".join(f"{ratio:.3f}" for ratio in ratios) + " times slower"
    split = "|".join(map(str, row["sms"]))
    return f"{' beside '.join(row['operations']):55} {split:8} {told or 'alone only'}"
