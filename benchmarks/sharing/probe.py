"""P0: what the driver says it can split, and on which SMs the lanes' kernels really run."""

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import combinations
from typing import Any

import torch

from benchmarks.sharing.arms import FAILURES
from benchmarks.sharing.lanes import LaneBank
from benchmarks.sharing.multiplexing import failure
from benchmarks.sharing.sensors import Sensors
from benchmarks.sharing.setting import Setting, synchronize
from megatron_mosaic.errors import HostError
from megatron_mosaic.sharing.lane import Lanes

CONNECTIONS = (1, 8, 32)
"""Values of CUDA_DEVICE_MAX_CONNECTIONS."""

GROUP_SMS = (8, 16, 32)
SPIN_S = 2e-4
BLOCKS_PER_SM = 8
"""Of the kernel that asks for its SM: enough that every SM of a lane has one of them."""

_MOST_OF_THREE = 6  # partitions of three lanes: the way they are combined is what is of interest


def measure(setting: Setting) -> Iterator[dict[str, Any]]:
    """Asks the device, then looks where kernels ran; on a host says what needs a device."""
    for key, probe in (
        ("versions", _versions),
        ("resource", _resource),
        ("split by count", _splits_by_count),
        ("equal groups", _equal_groups),
        ("lanes", _lanes),
        ("two plain green contexts", _plain_contexts),
        ("connections", _connections),
    ):
        if setting.tiny and key not in ("versions", "lanes"):
            yield {"probe": key, "needs": "a GPU"}
            continue
        try:
            yield {"probe": key, **probe(setting)}
        except FAILURES as error:
            yield {"probe": key, "failed": failure(error)}


def _versions(setting: Setting) -> dict[str, Any]:
    found = {"python": sys.version.split()[0], "torch": torch.__version__,
             "cuda": torch.version.cuda, "triton": _version("triton"),
             "cuda_bindings": _version("cuda.bindings"),
             "connections": os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS"),
             **Sensors(setting.device).describe()}  # fmt: skip
    if not setting.tiny:
        found["driver_api"] = _ask(_driver().cuDriverGetVersion())
    return found


def _version(module: str) -> str | None:
    try:
        return str(importlib.import_module(module).__version__)
    except ImportError:
        return None


def _driver() -> Any:
    torch.cuda.init()
    return importlib.import_module("cuda.bindings.driver")


def _ask(answer: Sequence[Any]) -> Any:
    """What a call of the driver returns behind its code.

    Raises:
        RuntimeError: The code is not success.
    """
    code, *found = answer
    if int(code) != 0:
        raise RuntimeError(f"the driver says {code}")
    return found[0] if len(found) == 1 else tuple(found)


def _sm_resource(setting: Setting) -> Any:
    driver = _driver()
    device = _ask(driver.cuDeviceGet(setting.device.index or 0))
    kind = driver.CUdevResourceType.CU_DEV_RESOURCE_TYPE_SM
    return _ask(driver.cuDeviceGetDevResource(device, kind))


def _resource(setting: Setting) -> dict[str, Any]:
    """SMs, least group and alignment as the device says them."""
    sm = _sm_resource(setting).sm
    names = ("smCount", "minSmPartitionSize", "smCoscheduledAlignment")
    return {name: getattr(sm, name, None) for name in names}


def _splits_by_count(setting: Setting) -> dict[str, Any]:
    """Every count from 1 on, what was given, and what was left, with and without flags."""
    driver, rows = _driver(), []
    for flags in (0, 1):
        for asked in range(1, setting.num_sms + 1):
            code, groups, number, rest = driver.cuDevSmResourceSplitByCount(
                1, _sm_resource(setting), flags, asked
            )
            given = groups[0].sm.smCount if int(code) == 0 and number else None
            left = rest.sm.smCount if int(code) == 0 else None
            rows.append({"flags": flags, "asked": asked, "code": int(code),
                         "given": given, "left": left})  # fmt: skip
    return {"splits": rows}


def _equal_groups(setting: Setting) -> dict[str, Any]:
    """Several groups of one size from one split: what more than two lanes are made of."""
    driver, rows = _driver(), []
    for size in GROUP_SMS:
        for asked in range(2, setting.num_sms // size + 1):
            code, groups, number, rest = driver.cuDevSmResourceSplitByCount(
                asked, _sm_resource(setting), 0, size
            )
            good = int(code) == 0
            given = [group.sm.smCount for group in groups[:number]] if good else None
            rows.append({"asked": asked, "sms": size, "code": int(code), "given": given,
                         "left": rest.sm.smCount if good else None})  # fmt: skip
    return {"splits": rows}


def _lanes(setting: Setting) -> dict[str, Any]:
    """Opens every split of two and some of three lanes, and asks kernels where they ran."""
    bank = LaneBank(setting)
    threes = setting.splits(3)
    rows = []
    for split in [*setting.splits(2), *threes[:: max(1, len(threes) // _MOST_OF_THREE)]]:
        asked = {f"lane{number}": sms for number, sms in enumerate(split)}
        row: dict[str, Any] = {"asked": asked}
        try:
            lanes = bank.lanes("green", asked)
        except FAILURES as error:
            rows.append(row | {"failed": failure(error)})
            continue
        row["read_back"] = {name: lane.sms for name, lane in lanes.named.items()}
        row["backend"] = lanes.backend
        row |= {"needs": "a GPU"} if setting.tiny else where_lanes_ran(lanes, setting)
        rows.append(row)
    return {"splits": rows}


def where_lanes_ran(lanes: Lanes, setting: Setting) -> dict[str, Any]:
    """SMs that blocks of each lane were on while all lanes were at work."""
    spin = importlib.import_module("benchmarks.sharing.kernels").Spin
    found = {}
    for whole in (False, True):
        spins = {}
        for name in lanes.named:
            spins[name] = spin(BLOCKS_PER_SM * setting.num_sms, setting.device)
            synchronize(setting.device)
        for name, lane in lanes.named.items():
            with lane.active(whole=whole):
                spins[name].launch(SPIN_S)
        synchronize(setting.device)
        found[whole] = {name: each.sms() for name, each in spins.items()}
    sets = [set(own) for own in found[False].values()]
    return {
        "sms": found[False],
        "counts": {name: len(own) for name, own in found[False].items()},
        "counts_whole": {name: len(own) for name, own in found[True].items()},
        "disjoint": not any(a & b for a, b in combinations(sets, 2)),
    }


def _plain_contexts(setting: Setting) -> dict[str, Any]:
    """Two contexts of half the GPU, made one by one: torch gives both the same SMs."""
    spin = importlib.import_module("benchmarks.sharing.kernels").Spin
    half = setting.num_sms // 16 * 8
    module: Any = getattr(torch.cuda, "green_contexts", None)
    create: Callable[..., Any] | None = getattr(
        getattr(module, "GreenContext", None), "create", None
    )
    if create is None:
        raise HostError(f"torch={torch.__version__} must have GreenContext.create; nothing to show")
    contexts = [create(num_sms=half, device_id=setting.device.index or 0) for _ in range(2)]
    sms = []
    for context in contexts:
        own = spin(BLOCKS_PER_SM * setting.num_sms, setting.device)
        synchronize(setting.device)
        with context.Stream():
            own.launch(SPIN_S)
        synchronize(setting.device)
        sms.append(own.sms())
    return {"asked": half, "counts": [len(own) for own in sms],
            "shared": len(set(sms[0]) & set(sms[1]))}  # fmt: skip


def _connections(setting: Setting) -> dict[str, Any]:
    """Two kernels in two streams, in a process for each number of hardware queues."""
    rows = []
    for number in CONNECTIONS:
        command = [sys.executable, "-m", "benchmarks.sharing.connections"]
        environment = os.environ | {"CUDA_DEVICE_MAX_CONNECTIONS": str(number)}
        try:
            ran = subprocess.run(
                command, env=environment, capture_output=True, text=True, timeout=120, check=False
            )
        except subprocess.TimeoutExpired as error:
            rows.append({"connections": number, "failed": f"no answer in {error.timeout:.0f} s"})
            continue
        lines = (ran.stdout if ran.returncode == 0 else ran.stderr).strip().splitlines()
        last = lines[-1] if lines else "nothing was printed"
        row = json.loads(last) if ran.returncode == 0 else {"failed": last}
        rows.append({"connections": number, **row})
    return {"connections": rows}


def summary(row: dict[str, Any]) -> str:
    """One line while it runs."""
    if "needs" in row or "failed" in row:
        return f"{row['probe']:26} {row.get('failed') or 'needs ' + row['needs']}"
    if row["probe"] == "lanes":
        proven = [split.get("disjoint") for split in row["splits"]]
        return f"{row['probe']:26} {proven.count(True)} of {len(proven)} splits proven disjoint"
    return f"{row['probe']:26} {str({k: v for k, v in row.items() if k != 'splits'})[:120]}"
