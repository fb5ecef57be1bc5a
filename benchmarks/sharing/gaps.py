"""P5: an encoder in a gap of the language model, which tells bubbles filled from SMs shared.

language | F |  gap: one block spins  | B |
encoder        | F B of another microbatch |
"""

import importlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from benchmarks.sharing.arms import FAILURES, Arm, Bench, cap_quotas
from benchmarks.sharing.capture import Captures
from benchmarks.sharing.cases import LANGUAGE, Case, cases_for
from benchmarks.sharing.lanes import LaneBank
from benchmarks.sharing.multiplexing import failure
from benchmarks.sharing.runner import alone, first_microbatch
from benchmarks.sharing.setting import Budget, Setting, median_s
from benchmarks.sharing.stats import in_turns, median_interval, recovered_share

GAPS_OF_ENCODER = (0.25, 0.5, 1.0, 2.0)
"""Lengths of the gap, over what the encoder takes alone."""

CAP_SHARE = 0.75
"""Of the SMs, for an encoder in a gap: one that has almost all of them needs two waves of blocks
for what is made for all."""

GAP_CASES = ("ViT-L b1 / 1B s2048", "ViT-L b4 / 8B-8L s2048")


def measure(setting: Setting) -> Iterator[dict[str, Any]]:
    """Measures gaps of several lengths, with the encoder behind the gap and in it."""
    budget, bank = Budget(seconds=setting.budget_s), LaneBank(setting)
    for case in _cases(setting):
        bench = Bench(case, setting, bank)
        encoder = GapStep(bench)
        encoder_s = median_s(
            encoder.captured(encoder.encoder), setting.device, repeats=5, warm_up=1
        )
        for part in GAPS_OF_ENCODER:
            row = {"case": case.name, "gap_of_encoder": part}
            if budget.spent:
                yield row | {"arm": None, "skipped": budget.told()}
                continue
            for found in encoder.measure(part * encoder_s, encoder_s):
                yield row | found


def _cases(setting: Setting) -> list[Case]:
    pairs = [case for case in cases_for(setting) if len(case.encoders) == 1]
    return [case for case in pairs if setting.tiny or case.name in GAP_CASES]


class GapStep:
    """One microbatch of a language model with a gap in it, and an encoder's work for another."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self._setting = bench.setting
        self._captures = Captures(bench.setting.device)
        (name,) = bench.case.encoders
        self._name = name
        self.encoder = alone(bench.modules, first_microbatch(bench.batch), name)
        batch = first_microbatch(bench.batch)
        with torch.no_grad():
            self._rows = bench.modules[name](batch[name][0])
        self._words = batch[LANGUAGE][0]
        self._spin: Any = None
        if not self._setting.tiny:
            module = importlib.import_module("benchmarks.sharing.kernels")
            self._spin = module.Spin(1, self._setting.device)

    def captured(self, run: Callable[[], None]) -> Callable[[], None]:
        """Captures where the device can: so many small kernels are slow to launch one by one."""
        return run if self._setting.tiny else self._captures.captured(run)

    def measure(self, gap_s: float, encoder_s: float) -> Iterator[dict[str, Any]]:
        """Measures one length of the gap in all arms, which take turns."""
        graphs, most = not self._setting.tiny, CAP_SHARE * self._setting.num_sms
        cap = max(sms for sms in self._setting.quotas() if sms <= most)
        sms = cap_quotas(self._bench.case, cap)
        arms = [
            Arm(name="serial", graphs=graphs),
            Arm(name="streams", mode="streams", graphs=graphs),
            Arm(name="priority", mode="priority", graphs=graphs),
            Arm(name="cap", mode="green", sms=sms, graphs=graphs),
        ]
        runs: dict[str, Callable[[], None]] = {}
        failed = {}
        for arm in arms:
            try:
                runs[arm.name] = self.captured(self._run_of(arm, gap_s))
            except FAILURES as error:
                failed[arm.name] = failure(error)
        times_s: dict[str, list[float]] = {name: [] for name in runs}
        for run in runs.values():
            run()
        for _, name in in_turns(list(runs), rounds=self._setting.rounds):
            times_s[name].append(self._bench.timed_s(runs[name]))
        for arm in arms:
            row: dict[str, Any] = {"arm": arm.name, **arm.written(), "gap_s": gap_s,
                                   "encoder_s": encoder_s}  # fmt: skip
            if arm.name in failed:
                yield row | {"failed": failed[arm.name]}
            else:
                yield row | self._told(times_s, arm.name, gap_s=gap_s, encoder_s=encoder_s)

    def _told(
        self, times_s: Mapping[str, list[float]], name: str, *, gap_s: float, encoder_s: float
    ) -> dict[str, Any]:
        found: dict[str, Any] = {"times_s": times_s[name], "recovered": None}
        if self._setting.tiny:
            return found | {"needs": "a GPU, lanes of a host take turns"}
        found["recovered"] = recovered_share(
            serial_s=median_interval(times_s["serial"]).estimate,
            overlapped_s=median_interval(times_s[name]).estimate,
            gap_s=gap_s,
            encoder_s=encoder_s,
        )
        return found

    def _run_of(self, arm: Arm, gap_s: float) -> Callable[[], None]:
        sms = {name: arm.sms.get(name) for name in self._bench.case.modules}
        lanes = self._bench.bank.lanes(arm.mode or "serial", sms)
        main, own, other = lanes.main, lanes.named[LANGUAGE], lanes.named[self._name]

        def run() -> None:
            own.wait(main.record())
            with own.active():
                leaf = self._rows.detach().requires_grad_()
                loss = self._bench.modules[LANGUAGE](self._words, [leaf])
            # Also where the gap begins: what fills it is not launched beside the forward pass.
            other.wait(own.record())
            with own.active():
                self._gap(gap_s)
            with other.active():
                self.encoder()
            with own.active():
                loss.backward()
            for lane in (own, other):
                main.wait(lane.record())

        return run

    def _gap(self, gap_s: float) -> None:
        if self._spin is None:
            time.sleep(gap_s)
        else:
            self._spin.launch(gap_s)


def summary(row: Mapping[str, Any]) -> str:
    """One line while it runs."""
    told = row.get("skipped") or row.get("failed")
    if not told:
        recovered = row["recovered"]
        told = "no GPU" if recovered is None else f"{100 * recovered:.0f} % recovered"
    return f"{row['case']:26} gap {row['gap_of_encoder']:.2f} T_E  {row['arm'] or '':10} {told}"
