"""Trains plans whose modules run at the same time, several runs on the same ranks."""

import os
import random
import tempfile
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from megatron_mosaic.rehearsal.isolation import forget_run, lanes_noted
from tests.parity.record import Record, record_plan
from tests.parity.training import TIMEOUT_S
from tests.ranks import run_ranks


class Run(NamedTuple):
    """A plan to train.

    Args:
        plan: Its text.
        options: Options of the script.
        script: The script.
        around: What is different about the run.
    """

    plan: str
    options: tuple[str, ...] = ()
    script: str = "vlm_script"
    around: Callable[[], AbstractContextManager[Any]] = nullcontext


def serial(text: str) -> str:
    """The same plan with one module after the other, and no encoder ahead of its step."""
    return _rewritten(text, "colocated" if "virtual_pipeline" not in text else "bubble_fill")


def concurrent(text: str) -> str:
    """The same plan with a lane for every module, in tasks of the same microbatches."""
    return _rewritten(text, "concurrent")


def _rewritten(text: str, kind: str) -> str:
    written = yaml.safe_load(text)
    schedule = written["schedule"]
    if schedule["kind"] == "colocated" and "encoder_group" not in schedule:
        language = written["modules"]["language"]
        replicas = language.get("data_parallel_size", 1)
        schedule["encoder_group"] = written["global_batch_size"] // (
            written["micro_batch_size"] * replicas
        )
    schedule["kind"] = kind
    if kind != "concurrent":
        schedule.pop("ahead", None)
    if kind == "colocated":
        schedule.pop("max_live", None)
    return yaml.safe_dump(written, sort_keys=False)


def train(world_size: int, runs: Sequence[Run]) -> list[tuple[Record, ...]]:
    """Trains plans one after the other on the same processes. Returns what their ranks recorded."""
    import torch.distributed as dist

    stores = [dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) for _ in runs]
    ports = [store.port for store in stores]
    with tempfile.TemporaryDirectory() as folder:
        records = run_ranks(
            record_runs,
            world_size,
            *(runs, ports, folder),
            init=False,
            timeout_s=TIMEOUT_S,
        )
    return list(zip(*records, strict=True))


def record_runs(rank: int, runs: Sequence[Run], ports: Sequence[int], folder: str) -> list[Record]:
    """Trains plans one after the other. Called on every rank.

    Args:
        rank: This rank.
        runs: What to train.
        ports: Where the ranks meet for each of them.
        folder: Where plans are written.
    """
    from megatron_mosaic.host.cpu import run_on_cpu

    run_on_cpu()
    records = []
    for number, run in enumerate(runs):
        path = Path(folder) / f"rank{rank}_{number}.yaml"
        path.write_text(run.plan)
        os.environ["MASTER_PORT"] = str(ports[number])
        with run.around(), lanes_noted() as lane:
            records.append(
                record_plan(rank, str(path), list(run.options), script=run.script, lane=lane)
            )
        forget_run()
    return records


@contextmanager
def in_another_order(seed: int) -> Any:
    """Launches steps in a random order of those that lanes and their events allow."""
    from megatron_mosaic.host import forward_backward

    in_lanes = forward_backward.in_lanes
    rng = random.Random(seed)
    forward_backward.in_lanes = lambda *args, **options: _reordered(in_lanes(*args, **options), rng)
    try:
        yield
    finally:
        forward_backward.in_lanes = in_lanes


def _reordered(walk: Any, rng: random.Random) -> Any:
    lanes: dict[str, deque[int]] = {}
    for position, step in enumerate(walk.steps):
        lanes.setdefault(step.lane, deque()).append(position)
    place: dict[int, int] = {}  # of each step in the new order
    while waiting := [lane for lane in lanes.values() if lane]:
        ready = [lane for lane in waiting if place.keys() >= set(walk.steps[lane[0]].after)]
        place[rng.choice(ready).popleft()] = len(place)
    return replace(
        walk,
        steps=tuple(
            walk.steps[old]._replace(after=tuple(place[each] for each in walk.steps[old].after))
            for old in place
        ),
        uses=tuple(walk.uses[old] for old in place),
    )
