"""Layouts whose modules run at the same time on the ranks they share, and whether that pays."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from math import inf

from megatron_mosaic.cluster.spec import Gpu
from megatron_mosaic.cost.cost_model import CostModel
from megatron_mosaic.layout.placement import LANGUAGE
from megatron_mosaic.planner.candidate import Candidate
from megatron_mosaic.planner.estimate import Estimate
from megatron_mosaic.planner.filling import num_tasks, ordered
from megatron_mosaic.planner.legal_sizes import divisors
from megatron_mosaic.planner.problem import Problem
from megatron_mosaic.planner.quotas import Quotas, first_quotas, more_quotas
from megatron_mosaic.planner.search import search
from megatron_mosaic.planner.simulated import Simulated, plan_under, simulated

LEAST_GAIN = 0.03
"""Gain over the best plan that runs one module at a time, below which modules do not share a GPU.

Published measurements of static splits with large models are about neutral, so that a smaller
predicted gain is as likely to be a loss. Ours until ``benchmarks.sharing_gpu`` has measured it.

Source: https://github.com/kekzl/imp/issues/1792 (neutral); that one splits only where it is
predicted to pay: DuetServe, arXiv 2511.04791.
"""

MAX_TASKS = 2_500
"""Tasks of a step up to which modules are examined at the same time."""

MAX_EXAMINED_TASKS = 40_000
"""Tasks of all plans that are examined together: some seconds, and more than a descent needs."""

_RANKS_A_TASK = 2
"""Ranks whose lists of tasks take as long to make as a task of a step takes to simulate, about."""

MOST_GAIN = 1.5
"""Times as long as the fastest plan that a layout may take, one module at a time, to be examined.

Ours: the best case that is published gains 1.31 (arXiv 2605.18710).
"""

NUM_SEARCHED = 24
"""Layouts with shared ranks that a search of their own finds."""

NUM_LAYOUTS = 6
"""Of these, those that are examined: one for each size of language and of its microbatches."""

NUM_SPLIT = 2
"""Of these, those for which all splits of a GPU are examined, or those that a descent comes to."""


NEAR = 0.05
"""Share by which such a layout may be slower than the best without lanes under its first quotas.

Ours: other splits bring less than that over the best of no quotas and those in proportion to work.
"""


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
    serial_s = serial[0].step_s if serial else inf
    layouts = []
    if can_share(problem) and may_share(problem):
        layouts = _shared_layouts(problem, cost_model, serial_s, time_limit_s=time_limit_s)
    if is_asked:  # who fixes the schedule is told what the same layouts take without it
        serial_s = min((first.step_s for first in layouts), default=inf)
    best = _best(layouts, examined, near_s=inf if is_asked else (1 + NEAR) * serial_s)
    gains = best is not None and serial_s / best.step_s - 1 >= LEAST_GAIN
    return Multiplexing(
        best=best,
        serial_s=serial_s,
        pays=is_asked or gains,
        num_examined=examined.count,
        obstacle=_obstacle(problem),
    )


def may_share(problem: Problem) -> bool:
    """Whether modules may run at the same time, by what is asked."""
    free = problem.pins.kind is None and problem.space.multiplexing
    return bool(problem.encoders) and (free or problem.pins.kind == "concurrent")


def can_share(problem: Problem) -> bool:
    """Whether modules can run at the same time, and it is known what they make of each other.

    In fp8 and fp4 Transformer Engine keeps scales of all modules in buffers of the process.
    """
    gpu, precision = problem.cluster.gpu, problem.model.precision
    known = gpu.sharing is not None and gpu.compute_capability is not None
    return known and precision in ("bf16", "fp16", "fp32")


def _needs_whole_layers(gpu: Gpu) -> bool:
    """Whether modules may share a GPU only without tensor and context parallelism.

    Before compute capability 10 Megatron asks those for ``CUDA_DEVICE_MAX_CONNECTIONS=1``, and
    with one queue kernels of different streams run in the order of their launch.

    Source:
        megatron/training/arguments.py, core_v0.19.0; CUDA C++ Programming Guide on the variable.
    """
    return gpu.compute_capability is not None and gpu.compute_capability < (10, 0)


def _obstacle(problem: Problem) -> str:
    """What keeps layouts from being examined."""
    gpu, precision = problem.cluster.gpu, problem.model.precision
    if gpu.sharing is None or gpu.compute_capability is None:
        return f"how modules share {gpu.name} is not known: megatron-mosaic profile --sharing"
    if not can_share(problem):
        return f"modules in {precision} share the buffers of their scales"
    if not _needs_whole_layers(gpu):
        return ""
    return (
        "those with tensor or context parallelism are left out, as Megatron asks them for "
        "CUDA_DEVICE_MAX_CONNECTIONS=1 before compute capability 10"
    )


def _shared_layouts(
    problem: Problem, cost_model: CostModel, serial_s: float, *, time_limit_s: float | None
) -> list[Simulated]:
    """The fastest layouts with shared ranks, one of each size of language and its microbatches.

    Of those only the ones that can gain enough.
    """
    pins, whole = problem.pins, _needs_whole_layers(problem.cluster.gpu)
    alone = {"tp": 1, "cp": 1} if whole else {}
    sizes = {name: {**alone, **pins.modules.get(name, {})} for name in problem.model.modules}
    if any(own[axis] > 1 for own in sizes.values() for axis in alone):
        return []
    asked = replace(problem, pins=replace(pins, kind="colocated", modules=sizes))
    found = search(
        asked,
        cost_model,
        top=NUM_SEARCHED,
        below_s=MOST_GAIN * serial_s,
        time_limit_s=time_limit_s,
    )
    kept = {}
    for estimate in found.best:
        candidate = estimate.candidate
        shared = any(encoder.shares for encoder in candidate.encoders)
        if shared and least_s(estimate) * (1 + LEAST_GAIN) <= serial_s:
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
            effort = count + self.problem.num_gpus // _RANKS_A_TASK
            if count > MAX_TASKS or effort > self._left:
                return None
            self.count, self._left = self.count + 1, self._left - effort
            self._known[candidate] = ordered(first, candidate, split, self.problem, self.cost_model)
        return self._known[candidate]


def least_s(estimate: Estimate) -> float:
    """Time of the language model's pipeline with the whole of its GPUs; no quotas are faster.

    A stage begins after the forward passes of those before it, and they end after its last
    backward pass.
    """
    number, before_s, longest_s = estimate.num_microbatches, 0.0, 0.0
    for stage in estimate.modules[LANGUAGE].stages:
        passes_s = stage.forward_s + stage.backward_s
        longest_s = max(longest_s, before_s + number * passes_s)
        before_s += passes_s
    return longest_s


def _best(layouts: Sequence[Simulated], examined: _Examined, *, near_s: float) -> Simulated | None:
    """The fastest plan of all layouts under the groups and quotas that are examined.

    Args:
        layouts: The fastest first.
        examined: What has been simulated.
        near_s: Step that a layout must reach under first quotas to be examined under others.
    """
    entries: list[Simulated] = []
    for first in layouts:
        ways = _ways(first, examined.problem)
        found = (examined.entry(first, candidate) for candidate in ways)
        entries += sorted(filter(None, found), key=lambda entry: entry.step_s)[:1]
    entries.sort(key=lambda entry: entry.step_s)
    near = [entry for entry in entries[:NUM_SPLIT] if entry.step_s <= near_s]
    split = [_split(entry, examined) for entry in near]
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
