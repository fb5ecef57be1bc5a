"""What ranks tell each other of themselves, through the rendezvous store."""

import json
import time
from dataclasses import asdict
from typing import Any

import torch.distributed as dist

from megatron_mosaic.engine.lost import Lost, Report
from megatron_mosaic.engine.progress import UNKNOWN_S, Phase, Place

_BOARD = "board"


class Bulletin:
    """Reports of all ranks, which rank 0 reads, and its board, which all others read.

    A rank writes one key and reads one, however many ranks there are; rank 0 reads all reports
    at once. It has a connection of its own, so that nobody waits for the main thread's.

    Args:
        store: The rendezvous store.
        rank: This rank.
        world_size: Ranks of the run.
    """

    def __init__(self, store: dist.Store, *, rank: int, world_size: int) -> None:
        prefixed: Any = dist.PrefixStore("mosaic-watch", store)  # torch's types lack clone
        self._store: dist.Store = prefixed.clone()
        self._rank = rank
        self._others = [other for other in range(world_size) if other != rank]
        self._number = 0
        now_s = time.monotonic()
        start = Place(Phase.START, 0, 0, 0, 0, 0, now_s, UNKNOWN_S)
        nothing = asdict(Report(place=start, age_s=0.0, silent_s=0.0, state="on"))
        # Of every writer: its last number, when it was new here, and what it said.
        self._heard: dict[int, tuple[int, float, dict[str, Any]]] = dict.fromkeys(
            range(world_size), (0, now_s, nothing)
        )
        self.lost: Lost | None = None

    def write_report(self, report: Report) -> None:
        """Says where this rank is."""
        self._number += 1
        self._store.set(f"report/{self._rank}", _to_text(self._number, report=asdict(report)))

    def read_reports(self) -> dict[int, Report]:
        """Reads what all other ranks said last; a rank that has said nothing yet is starting."""
        # Reading a key that is not there would wait for it.
        there = [r for r in self._others if self._heard[r][0] or self._has(f"report/{r}")]
        if there:
            found = self._store.multi_get([f"report/{rank}" for rank in there])
            for rank, content in zip(there, found, strict=True):
                self._note(rank, json.loads(content))
        return {rank: self.last_report(rank) for rank in self._others}

    def write_board(self, report: Report, lost: Lost | None) -> None:
        """Says, for rank 0, where it is and which rank is lost."""
        found = None if lost is None else asdict(lost)
        self._store.set(_BOARD, _to_text(self._number, report=asdict(report), lost=found))

    def write_lost(self, lost: Lost) -> None:
        """Writes in rank 0's place that it is lost."""
        number, _, report = self._heard[0]
        content = _to_text(number, report=report, lost=asdict(lost))
        self._store.set(_BOARD, content)

    def read_board(self) -> None:
        """Reads rank 0's board, if it is there; sets ``lost``."""
        if self._heard[0][0] or self._has(_BOARD):
            content = json.loads(self._store.get(_BOARD))
            self._note(0, content)
            if found := content["lost"]:
                place = Place.from_numbers(found.pop("place"))
                others = tuple(found.pop("others"))
                self.lost = Lost(place=place, others=others, **found)

    def last_report(self, rank: int) -> Report:
        """Returns what a rank said last, and how long ago that was."""
        _, at_s, report = self._heard[rank]
        silent_s = time.monotonic() - at_s
        place = Place.from_numbers(report["place"])
        return Report(**(report | {"place": place, "silent_s": silent_s}))

    def count(self, name: str, *, more: int = 0) -> int:
        """Adds to a counter of all ranks. Returns what it has come to."""
        return self._store.add(f"count/{name}", more)

    def await_count(self, name: str, value: int, *, interval_s: float, timeout_s: float) -> None:
        """Waits until the counter has come that far, or the time is up."""
        deadline_s = time.monotonic() + timeout_s
        while self.count(name) < value and time.monotonic() < deadline_s:
            time.sleep(interval_s / 10)

    def _has(self, key: str) -> bool:
        return self._store.check([key])

    def _note(self, rank: int, content: dict[str, Any]) -> None:
        if content["number"] != self._heard[rank][0]:
            self._heard[rank] = (content["number"], time.monotonic(), content["report"])


def _to_text(number: int, **content: Any) -> str:
    return json.dumps({"number": number, **content})
