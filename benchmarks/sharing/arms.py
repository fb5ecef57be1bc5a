"""Ways to run the same step: one module after the other, or at the same time in lanes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import inf
from typing import Any

import torch

from benchmarks.sharing.capture import Captures
from benchmarks.sharing.cases import LANGUAGE, Case
from benchmarks.sharing.choice import Planned, sms_of
from benchmarks.sharing.lanes import LaneBank
from benchmarks.sharing.modules import make_modules
from benchmarks.sharing.runner import StepRun, draw_batch, gradients, plan_of, relative_errors
from benchmarks.sharing.setting import Setting, synchronize, timed_s
from megatron_mosaic.errors import HostError, LayoutError
from megatron_mosaic.layout.plan import Plan

LARGEST_ERROR = 1e-2
"""Relative norm by which gradients in bf16 may differ from those of the first arm."""

USED_SHARE = 0.9
"""Of free memory that arms may fill together."""

IMPORTANCE = ("A", "A again", "A'", "G'", "F", "F cap", "G", "D", "E", "B'", "C'", "A' batch",
              "A batch", "B", "C")  # fmt: skip
"""Arms in the order in which they are kept where not all fit."""

FAILURES = (RuntimeError, NotImplementedError, HostError, LayoutError)
"""What an arm may end with on a machine that cannot run it; torch's out-of-memory is among it."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way.

    Args:
        name: Its letter in the protocol, and what tells two of one letter apart.
        mode: Backend of its lanes; None is without lanes.
        sms: Quotas of modules; those that are missing have none.
        graphs: Whether the step is captured once and replayed.
        encoder_group: Microbatches of one task of an encoder.
        plan: Runs this, and not the plan that the other fields make.
    """

    name: str
    mode: str | None = None
    sms: Mapping[str, int | None] = field(default_factory=dict)
    graphs: bool = False
    encoder_group: int = 1
    plan: Plan | None = None

    def written(self) -> dict[str, Any]:
        """As results have it."""
        return {
            "mode": self.mode,
            "sms": dict(self.sms),
            "graphs": self.graphs,
            "encoder_group": self.encoder_group,
        }


def serial_arms(case: Case) -> list[Arm]:
    """One module after the other: microbatch by microbatch, or the encoders' whole batch first.

    The first one runs again under another name, which says what is noise.
    """
    batch = case.num_microbatches
    return [
        Arm(name="A"),
        Arm(name="A'", graphs=True),
        Arm(name="A batch", encoder_group=batch),
        Arm(name="A' batch", graphs=True, encoder_group=batch),
        Arm(name="A again"),
    ]


def is_serial(name: str) -> bool:
    """Whether an arm may be the denominator of others; the control may not."""
    return name[0] == "A" and name != "A again"


def lane_arms(*, split: Arm | None, cap: Arm | None) -> list[Arm]:
    """Modules at the same time, under the best quotas and groups that a scan has found."""
    arms = [
        Arm(name="B", mode="streams"),
        Arm(name="B'", mode="streams", graphs=True),
        Arm(name="C", mode="priority"),
        Arm(name="C'", mode="priority", graphs=True),
    ]
    for best, launched, captured in ((split, "D", "F"), (cap, "E", "F cap")):
        if best is not None:
            arms.append(replace(best, name=launched, graphs=False))
            arms.append(replace(best, name=captured, graphs=True))
    return arms


def affordable(arms: Sequence[Arm], *, each_bytes: float, free_bytes: float) -> set[str]:
    """Names of the arms whose memory fits at once, those that say most first.

    The allocator keeps memory for every stream, and a pool for captured steps: only arms without
    lanes use each other's.

    Args:
        arms: All arms.
        each_bytes: What a step of one takes.
        free_bytes: What there is.
    """
    kept, left = set(), free_bytes
    seen: set[bool] = set()
    for arm in sorted(arms, key=lambda arm: IMPORTANCE.index(arm.name)):
        # The encoders' whole batch needs more than a microbatch, the language model no less.
        size = arm.encoder_group * each_bytes
        known = arm.mode is None and arm.graphs in seen and arm.encoder_group == 1
        if known or size <= left:
            kept.add(arm.name)
            left -= 0 if known else size
            seen |= {arm.graphs} if arm.mode is None else set()
    return kept


def planned_arm(planned: Planned, *, graphs: bool) -> Arm:
    """What the planner chose, launched one by one or captured."""
    shares = planned.plan.schedule.kind == "concurrent"
    return Arm(
        name="G'" if graphs else "G",
        mode="green" if shares else None,
        sms=sms_of(planned.plan) if shares else {},
        graphs=graphs,
        encoder_group=planned.plan.schedule.group_size(planned.plan.num_microbatches),
        plan=planned.plan,
    )


def split_quotas(case: Case, split: Sequence[int]) -> dict[str, int | None]:
    """A split as quotas of modules."""
    return dict(zip(case.modules, split, strict=True))


def cap_quotas(case: Case, sms: int) -> dict[str, int | None]:
    """Every encoder under a cap of so many SMs, the language model under none."""
    return {name: None if name == LANGUAGE else sms for name in case.modules}


class Bench:
    """Modules and batch of a case, and the arms that run them.

    Args:
        case: The case.
        setting: Where.
        bank: Opens lanes.
    """

    def __init__(self, case: Case, setting: Setting, bank: LaneBank) -> None:
        self.case = case
        self.setting = setting
        self.modules = make_modules(
            case.encoders,
            case.language,
            contrastive=case.contrastive,
            device=setting.device,
            dtype=setting.dtype,
            seed=setting.seed,
        )
        self.batch = draw_batch(case, setting)
        self.bank = bank
        self._captures = Captures(setting.device)
        first = Arm(name="A")
        run = self.run_of(first)
        before = self._allocated_bytes()
        self.step_bytes = (self.peak_bytes(first, run) or 0) - before
        run()
        synchronize(setting.device)
        self._reference = gradients(self.modules)

    def run_of(self, arm: Arm, *, captures: Captures | None = None) -> Callable[[], None]:
        """Returns what runs the step of an arm.

        Args:
            arm: The arm.
            captures: Captures steps in place of what all arms share.

        Raises:
            HostError: The device cannot give these lanes, or capture anything.
        """
        sms = None if arm.mode is None else {name: arm.sms.get(name) for name in self.case.modules}
        plan = arm.plan or plan_of(self.case, sms=sms, encoder_group=arm.encoder_group)
        lanes = self.bank.lanes(arm.mode or "serial", sms or {})
        run = StepRun(self.modules, self.batch, plan, lanes)
        return (captures or self._captures).captured(run) if arm.graphs else run

    def _allocated_bytes(self) -> int:
        on_gpu = self.setting.device.type == "cuda"
        return torch.cuda.memory_allocated(self.setting.device) if on_gpu else 0

    def free_bytes(self) -> float:
        """Memory that arms may fill; a host has no bound."""
        if self.setting.device.type != "cuda":
            return inf
        torch.cuda.empty_cache()
        return USED_SHARE * torch.cuda.mem_get_info(self.setting.device)[0]

    def check(self, run: Callable[[], None]) -> dict[str, float]:
        """Gradients' relative errors of one run against the first arm's, by module."""
        run()
        synchronize(self.setting.device)
        return relative_errors(self.modules, self._reference)

    def timed_s(self, run: Callable[[], None]) -> float:
        """Seconds of one run."""
        return timed_s(run, self.setting.device)

    def peak_bytes(self, arm: Arm, run: Callable[[], None]) -> int | None:
        """Most memory that tensors have during one run; None where a captured pool has it."""
        if self.setting.device.type != "cuda" or arm.graphs:
            return None
        torch.cuda.reset_peak_memory_stats(self.setting.device)
        run()
        synchronize(self.setting.device)
        return torch.cuda.max_memory_allocated(self.setting.device)
