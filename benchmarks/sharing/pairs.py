"""P2: operations and modules beside each other on splits of the GPU, and alone on the same SMs."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from typing import Any

from benchmarks.sharing.arms import FAILURES
from benchmarks.sharing.capture import Captures
from benchmarks.sharing.cases import LANGUAGE, Case, cases_for
from benchmarks.sharing.curves import IN_A_ROW, in_lane, lane_seconds, repeated_s
from benchmarks.sharing.lanes import LaneBank
from benchmarks.sharing.modules import make_modules
from benchmarks.sharing.multiplexing import failure, free_cached
from benchmarks.sharing.operations import Operation, operations
from benchmarks.sharing.runner import alone, draw_batch, first_microbatch
from benchmarks.sharing.setting import Budget, Setting, synchronize
from benchmarks.sharing.work import counted
from megatron_mosaic.sharing.lane import Lanes

LANES = ("first", "second")
SPLITS = ((32, 100), (64, 68), (100, 32))
"""Of an H200, in SMs."""

CHOSEN = ("gemm 8B s2048 up", "attention 1B s2048 both", "gelu 8B s8192")
"""One operation of each kind."""

MODULE = "module"
"""Kind of an encoder or language model, forward and backward on one microbatch."""

MODULE_CASES = ("ViT-L b4 / 1B s512", "ViT-L b16 / 8B-8L s2048", "SigLIP b4 / 1B s2048")

LONGER = 3
"""Times as long as what is timed that the other lane is kept at work."""

Run = Callable[[], Any]


def measure(setting: Setting) -> Iterator[dict[str, Any]]:
    """Measures all pairs of one operation of each kind, then pairs of modules, on some splits."""
    budget, bank = Budget(seconds=setting.budget_s), LaneBank(setting)
    splits = setting.splits(2) if setting.tiny else SPLITS
    for pair in product(chosen_operations(setting), repeat=2):
        yield from _on_splits(pair, splits, bank, setting, budget, times=IN_A_ROW)
    for case in cases_for(setting):
        if len(case.encoders) == 1 and (setting.tiny or case.name in MODULE_CASES):
            pair = module_pair(case, setting)
            yield from _on_splits(pair, splits, bank, setting, budget, times=1)
            free_cached(setting)


def chosen_operations(setting: Setting) -> list[Operation]:
    """One operation of each kind."""
    found = operations(setting)
    if not setting.tiny:
        return [each for each in found if each.name in CHOSEN]
    return list({each.kind: each for each in found}.values())


def module_pair(case: Case, setting: Setting) -> tuple[Operation, Operation]:
    """The encoder and the language model of a case, each on what a microbatch holds."""
    modules = make_modules(
        case.encoders,
        case.language,
        contrastive=case.contrastive,
        device=setting.device,
        dtype=setting.dtype,
        seed=setting.seed,
    )
    batch = first_microbatch(draw_batch(case, setting))
    (encoder,) = case.encoders
    names = case.name.split(" / ")[0], case.name.split(" / ")[-1]
    runs = [alone(modules, batch, name) for name in (encoder, LANGUAGE)]
    first, second = (
        Operation(name=name, kind=MODULE, run=run, work=counted(run))
        for name, run in zip(names, runs, strict=True)
    )
    return first, second


def _on_splits(
    pair: Sequence[Operation],
    splits: Sequence[Sequence[int]],
    bank: LaneBank,
    setting: Setting,
    budget: Budget,
    *,
    times: int,
) -> Iterator[dict[str, Any]]:
    for split in splits:
        row: dict[str, Any] = {
            "operations": [each.name for each in pair],
            "kinds": [each.kind for each in pair],
            "sms": list(split),
            "flops": [each.work.flops for each in pair],
            "bytes": [each.work.num_bytes for each in pair],
        }
        if budget.spent:
            yield row | {"skipped": budget.told()}
            continue
        try:
            lanes = bank.lanes("green", dict(zip(LANES, split, strict=True)))
            runs = [_launchable(each, lanes, lane, setting) for each, lane in
                    zip(pair, LANES, strict=True)]  # fmt: skip
            yield row | measure_pair(runs, lanes, setting, times=times)
        except FAILURES as error:
            yield row | {"failed": failure(error)}


def _launchable(operation: Operation, lanes: Lanes, name: str, setting: Setting) -> Run:
    """Modules are captured in their lane, as the host would not keep two of them at work."""
    if setting.tiny or operation.kind != MODULE:
        return operation.run
    with lanes.named[name].active():
        return Captures(setting.device).captured(operation.run)


def measure_pair(
    runs: Sequence[Run], lanes: Lanes, setting: Setting, *, times: int
) -> dict[str, Any]:
    """Seconds of one launch of each, alone in its lane and while the other lane is at work."""
    alone_s = [
        repeated_s(in_lane(lanes, {name: run}, times=times), setting, times=times)
        for name, run in zip(LANES, runs, strict=True)
    ]
    if setting.tiny:
        return {"solo_s": alone_s, "co_run_s": None, "needs": "a GPU, lanes of a host take turns"}
    beside_s = [
        _beside_s(lanes, runs, alone_s, timed=number, setting=setting, times=times)
        for number in range(2)
    ]
    return {"solo_s": alone_s, "co_run_s": beside_s}


def _beside_s(
    lanes: Lanes,
    runs: Sequence[Run],
    alone_s: Sequence[float],
    *,
    timed: int,
    setting: Setting,
    times: int,
) -> float:
    """Median seconds of a launch in one lane; the other one begins before and ends after."""
    other = 1 - timed
    num_other = max(LONGER, round(LONGER * times * alone_s[timed] / alone_s[other]))
    lead = num_other // LONGER
    taken_s = []
    for _ in range(setting.warm_up + setting.rounds):
        synchronize(setting.device)
        begun = lanes.main.record()
        mine, theirs = lanes.named[LANES[timed]], lanes.named[LANES[other]]
        mine.wait(begun)
        theirs.wait(begun)
        lane_seconds(theirs, runs[other], times=lead)
        start, end = lane_seconds(mine, runs[timed], times=times)
        lane_seconds(theirs, runs[other], times=num_other - lead)
        synchronize(setting.device)
        taken_s.append(start.elapsed_time(end) / 1e3 / times)
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
