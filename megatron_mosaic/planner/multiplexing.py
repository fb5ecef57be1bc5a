"""Layouts whose modules run at the same time on the ranks they share, and whether that pays."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from math import inf

from megatron_mosaic.cluster.spec import Gpu
from megatron_mosaic.cost.cost_model import CostModel
from megatron_mosaic.cost.plan_memory import task_microbatches
from megatron_mosaic.planner.candidate import Candidate
from megatron_mosaic.planner.filling import num_tasks, ordered
from megatron_mosaic.planner.legal_sizes import divisors
from megatron_mosaic.planner.problem import Problem
from megatron_mosaic.planner.quotas import Quotas, first_quotas, more_quotas
from megatron_mosaic.planner.search import search
from megatron_mosaic.planner.simulated import Simulated, plan_under, simulated
from megatron_mosaic.schedule.graph import rank_kinds

LEAST_GAIN = 0.03
"""Gain over the best plan that runs one module at a time, below which modules do not share a GPU.

Measured throughputs of static splits differ from serial ones by about as much either way, so that
a smaller predicted gain is as likely to be a loss.

Source: section 8 of the design; pegainfer's green contexts on an RTX 5090 (+-1 %), and those of
https://github.com/kekzl/imp/issues/1792 (neutral).
"""

MAX_TASKS = 2_500
"""Tasks of a step up to which modules are examined at the same time."""

MAX_EXAMINED_TASKS = 150_000
"""Tasks of all plans that are examined together: about ten seconds."""

NUM_SEARCHED = 24
"""Layouts with shared ranks that a search of their own finds."""

NUM_LAYOUTS = 6
"""Of these, those that are examined: one for each size of language and of its microbatches."""

NUM_SPLIT = 2
"""Of these, those for which all splits of a GPU are examined, or those that a descent comes to."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Multiplexing:
    """What came of letting modules run at the same time.

    Args:
        best: The fastest plan that has it and fits; ``None`` if there is none.
        serial_s: Step of the fastest plan that runs one module at a time; infinite if none does.
        pays: Whether the best gains enough, or is what the user has fixed.
        num_examined: Plans that were simulated.
        obstacle: Why layouts were left out, as a clause; empty if none was.
    """

    best: Simulated | None
    serial_s: float
    pays: bool
    num_examined: int
    obstacle: str

    @property
    def gain(self) -> float | None:
        """Share by which a step is longer with one module at a time; ``None`` if there is none."""
        return None if self.best is None else self.serial_s / self.best.step_s - 1


def multiplexed(
    serial: Sequence[Simulated],
    problem: Problem,
    cost_model: CostModel,
    *,
    time_limit_s: float | None = None,
) -> Multiplexing:
    """Finds the fastest plan whose modules run at the same time on the ranks they share.

    Layouts are those of a search of their own, as the fastest of all may be too fast to gain. For
    each, groups of microbatches are compared under few quotas; for the best ones all splits of a
    GPU between two modules are simulated, and for more of them those on the way of a descent.

    Args:
        serial: Plans that run one module at a time, the fastest first.
        problem: What is asked.
        cost_model: What things cost.
        time_limit_s: Ends the search for layouts; ``None`` is no limit.
    """
    examined = _Examined(problem, cost_model)
    is_asked = problem.pins.kind == "concurrent"
    layouts = []
    if can_share(problem.cluster.gpu) and may_share(problem):
        layouts = _shared_layouts(problem, cost_model, time_limit_s=time_limit_s)
    # Who fixes the schedule is told what the same layouts take without it.
    serial_s = min(
        (entry.step_s for entry in [*serial, *(layouts if is_asked else ())]), default=inf
    )
    best = _best(layouts, examined, below_s=inf if is_asked else serial_s / (1 + LEAST_GAIN))
    gains = best is not None and serial_s / best.step_s - 1 >= LEAST_GAIN
    return Multiplexing(
        best=best,
        serial_s=serial_s,
        pays=is_asked or gains,
        num_examined=examined.count,
        obstacle=_obstacle(problem.cluster.gpu),
    )


def may_share(problem: Problem) -> bool:
    """Whether modules may run at the same time, by what is asked."""
    free = problem.pins.kind is None and problem.space.multiplexing
    return bool(problem.encoders) and (free or problem.pins.kind == "concurrent")


def can_share(gpu: Gpu) -> bool:
    """Whether it is known what modules that run at the same time on a GPU make of each other."""
    return gpu.sharing is not None and gpu.compute_capability is not None


def _needs_whole_layers(gpu: Gpu) -> bool:
    """Whether modules may share a GPU only without tensor and context parallelism.

    Before compute capability 10 Megatron asks those for ``CUDA_DEVICE_MAX_CONNECTIONS=1``, and
    with one queue kernels of different streams run in the order of their launch.

    Source:
        megatron/training/arguments.py, core_v0.19.0; CUDA C++ Programming Guide on the variable.
    """
    return gpu.compute_capability is not None and gpu.compute_capability < (10, 0)


def _obstacle(gpu: Gpu) -> str:
    """What keeps layouts from being examined."""
    if not can_share(gpu):
        return f"how modules share {gpu.name} is not known: megatron-mosaic profile --sharing"
    if not _needs_whole_layers(gpu):
        return ""
    return (
        "those with tensor or context parallelism are left out, as Megatron asks them for "
        "CUDA_DEVICE_MAX_CONNECTIONS=1 before compute capability 10"
    )


def _shared_layouts(
    problem: Problem, cost_model: CostModel, *, time_limit_s: float | None
) -> list[Simulated]:
    """The fastest layouts with shared ranks, one of each size of language and its microbatches."""
    pins, whole = problem.pins, _needs_whole_layers(problem.cluster.gpu)
    alone = {"tp": 1, "cp": 1} if whole else {}
    sizes = {name: {**alone, **pins.modules.get(name, {})} for name in problem.model.modules}
    if any(own[axis] > 1 for own in sizes.values() for axis in alone):
        return []
    asked = replace(problem, pins=replace(pins, kind="colocated", modules=sizes))
    found = search(asked, cost_model, top=NUM_SEARCHED, time_limit_s=time_limit_s)
    kept = {}
    for estimate in found.best:
        candidate = estimate.candidate
        if any(encoder.shares for encoder in candidate.encoders):
            kept.setdefault((candidate.language, candidate.micro_batch_size), estimate)
    return [
        simulated(estimate, problem, cost_model) for estimate in list(kept.values())[:NUM_LAYOUTS]
    ]


class _Examined:
    """Simulates candidates, each once, as long as there is effort left."""

    def __init__(self, problem: Problem, cost_model: CostModel) -> None:
        self.problem, self.cost_model = problem, cost_model
        self.count, self._left = 0, MAX_EXAMINED_TASKS
        self._known: dict[Candidate, Simulated | None] = {}

    def entry(self, first: Simulated, candidate: Candidate) -> Simulated | None:
        """A candidate's plan and step; None if it does not fit, is too long, or comes too late."""
        if candidate not in self._known:
            split = first.layers_per_stage
            count = num_tasks(plan_under(candidate, split, self.problem))
            if count > min(MAX_TASKS, self._left):
                return None
            self.count, self._left = self.count + 1, self._left - count
            self._known[candidate] = ordered(first, candidate, split, self.problem, self.cost_model)
        return self._known[candidate]

    def least_s(self, first: Simulated, candidate: Candidate) -> float:
        """Time of the longest lane with the whole GPU; no quotas are faster."""
        plan = plan_under(candidate, first.layers_per_stage, self.problem)
        tasks_s = self.cost_model.plan_durations(plan).tasks_s
        work_s = (
            sum(
                sum(tasks_s[stage]) * plan.num_microbatches / task_microbatches(plan, name)
                for stage in kind.stages
                if stage.module == name
            )
            for kind in rank_kinds(plan)
            for name in plan.modules
        )
        return max(work_s)


def _best(layouts: Sequence[Simulated], examined: _Examined, *, below_s: float) -> Simulated | None:
    """The fastest plan of all layouts under the groups and quotas that are examined."""
    problem = examined.problem
    entries: list[Simulated] = []
    for first in layouts:
        ways = [
            candidate
            for candidate in _ways(first, problem)
            if examined.least_s(first, candidate) < below_s
        ]
        found = (examined.entry(first, candidate) for candidate in ways)
        entries += sorted(filter(None, found), key=lambda entry: entry.step_s)[:1]
    entries.sort(key=lambda entry: entry.step_s)
    split = [_split(entry, examined) for entry in entries[:NUM_SPLIT]]
    return min(chain(split, entries), key=lambda entry: entry.step_s, default=None)


def _ways(first: Simulated, problem: Problem) -> Iterator[Candidate]:
    """Yields a layout with all groups of microbatches, a step ahead or not, under first quotas."""
    candidate = replace(first.candidate, kind="concurrent")
    if problem.pins.placement not in (None, candidate.placement):
        return
    samples = candidate.micro_batch_size * candidate.language.dp
    most = max(encoder.sizes.dp for encoder in candidate.encoders)
    modules = problem.model.modules
    frozen = any(modules[encoder.name].trainable == () for encoder in candidate.encoders)
    for group in divisors(first.estimate.num_microbatches):
        if group * samples < most or problem.pins.encoder_group not in (None, group):
            continue
        for ahead in (False, True) if frozen else (False,):
            way = replace(candidate, encoder_group=group, ahead=ahead)
            for quotas in first_quotas(first, problem):
                yield replace(way, quotas=quotas)


def _split(entry: Simulated, examined: _Examined) -> Simulated:
    """The fastest of a layout under more quotas, and then under its other groups with these."""
    best = entry
    while True:
        before = best
        for quotas in more_quotas(best, examined.problem):
            best = _faster(best, examined.entry(entry, _with_quotas(best, quotas)))
        for way in _ways(entry, examined.problem):
            other = replace(way, quotas=best.candidate.quotas)
            best = _faster(best, examined.entry(entry, other))
        if best is before:
            return best


def _with_quotas(entry: Simulated, quotas: Quotas) -> Candidate:
    return replace(entry.candidate, quotas=quotas)


def _faster(best: Simulated, other: Simulated | None) -> Simulated:
    return other if other is not None and other.step_s < best.step_s else best
