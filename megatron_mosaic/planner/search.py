"""Finds the fastest candidates: branch and bound over sizes of modules and their hosts."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import inf
from time import monotonic

from megatron_mosaic.cost.cost_model import CostModel
from megatron_mosaic.cost.costs import ModuleCosts
from megatron_mosaic.layout.plan import ScheduleKind
from megatron_mosaic.planner.balance import stock_tokens
from megatron_mosaic.planner.bounds import (
    LanguageOption,
    encoder_work_s,
    language_options,
)
from megatron_mosaic.planner.candidate import Candidate, Host
from megatron_mosaic.planner.closed_form import Hosted
from megatron_mosaic.planner.encoder_search import EncoderSearch, Light
from megatron_mosaic.planner.estimate import Estimate, Estimator
from megatron_mosaic.planner.module_times import ModuleTimes, module_times
from megatron_mosaic.planner.placements import (
    assignments,
    homogeneous,
    schedules,
)
from megatron_mosaic.planner.problem import Problem


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """What a search has found.

    Args:
        best: Fastest candidates, the fastest first; one for each way to place the modules
            around the same language model.
        baseline: Fastest homogeneous candidate that fits; ``None`` if none does.
        bound_s: No candidate of the space is faster.
        num_language: Sizes of the language model that were compared.
        num_estimates: Candidates that were estimated in full.
    """

    best: tuple[Estimate, ...]
    baseline: Estimate | None
    bound_s: float
    num_language: int
    num_estimates: int

    @property
    def gap(self) -> float:
        """Share by which the best found is slower than the bound, at most."""
        return self.best[0].step_s / self.bound_s - 1 if self.best else inf


def search(
    problem: Problem,
    cost_model: CostModel,
    *,
    top: int = 3,
    time_limit_s: float | None = None,
    below_s: float = inf,
    first: bool = False,
    clock: Callable[[], float] = monotonic,
) -> Found:
    """Finds the fastest candidates that fit, and the fastest homogeneous one.

    Without a time limit the result is the optimum of the space, and always the same.

    Args:
        problem: What is asked.
        cost_model: What things cost.
        top: Candidates to return.
        time_limit_s: Ends the search with the best so far; ``None`` is no limit.
        below_s: Step time that candidates must be below to be of interest.
        first: Ends the search with the first candidates that fit.
        clock: Seconds; tests have their own.
    """
    stop_s = inf if time_limit_s is None else clock() + time_limit_s
    run = Run(problem, cost_model, top=top, below_s=below_s, late=lambda: clock() > stop_s)
    run.find_baseline()
    if not (first and run.best.estimates):
        run.find_best(first=first)
    return run.found()


@dataclass(slots=True)
class _Best:
    """The fastest estimates so far, one of each key, the fastest first."""

    top: int
    estimates: list[Estimate]
    below_s: float = inf

    @property
    def threshold_s(self) -> float:
        """Time that another one must be below."""
        return self.estimates[-1].step_s if len(self.estimates) == self.top else self.below_s

    def add(self, estimate: Estimate) -> None:
        """Adds an estimate if it is among the fastest; the earlier of equals stays."""
        known = any(estimate.candidate == other.candidate for other in self.estimates)
        if estimate.step_s < self.threshold_s and not known:
            self.estimates.append(estimate)
            self.estimates.sort(key=lambda e: e.step_s)  # stable
            del self.estimates[self.top :]


class Run:
    """One search: what is known so far."""

    def __init__(
        self,
        problem: Problem,
        cost_model: CostModel,
        *,
        top: int,
        below_s: float,
        late: Callable[[], bool],
    ) -> None:
        self.problem, self.late = problem, late
        self.estimator = Estimator(problem, cost_model)
        self.best, self.baseline = _Best(top, [], below_s), _Best(1, [])
        self.num_estimates = 0
        self.unexplored_s = inf  # bound of what a time limit has left out
        work_s = encoder_work_s(self.estimator)
        self.options = language_options(self.estimator, encoder_work_s=work_s)
        self.shared: dict[tuple[object, ...], list[Light]] = {}
        self.options_of: dict[tuple[object, ...], list[Light]] = {}
        self._times: dict[int, tuple[ModuleCosts, ModuleTimes]] = {}

    def times(self, costs: ModuleCosts) -> ModuleTimes:
        """Times of an encoder."""
        kept = self._times.get(id(costs))
        if kept is None or kept[0] is not costs:
            kept = self._times[id(costs)] = (costs, module_times(costs, trainable_upstream=False))
        return kept[1]

    def found(self) -> Found:
        """The result."""
        best = tuple(self.best.estimates)
        bound_s = min(self.unexplored_s, best[0].step_s if best else inf)
        return Found(
            best=best,
            baseline=self.baseline.estimates[0] if self.baseline.estimates else None,
            bound_s=bound_s,
            num_language=len(self.options),
            num_estimates=self.num_estimates,
        )

    def estimate(self, candidate: Candidate) -> Estimate | None:
        """Estimates a candidate in full."""
        self.num_estimates += 1
        return self.estimator.estimate(candidate)

    def find_baseline(self) -> None:
        """Finds the fastest homogeneous candidate."""
        for option in self.options:
            if option.bound_s >= self.baseline.threshold_s:
                break
            if self.late():
                break
            sizes = stock_tokens(option.sizes, self.problem.workload)
            for candidate in homogeneous(self.problem, sizes, option.micro_batch_size):
                estimate = self.estimate(candidate)
                if estimate is not None:
                    self.baseline.add(estimate)
        for estimate in self.baseline.estimates:
            self.best.add(estimate)

    def find_best(self, *, first: bool = False) -> None:
        """Finds the fastest candidates of all, or the first ones."""
        for option in self.options:
            if first and self.best.estimates:
                break
            if option.bound_s >= self.best.threshold_s:
                break
            if self.late():
                self.unexplored_s = min(self.unexplored_s, option.bound_s)
                break
            alone = self._alone(option)
            if alone is None:
                continue
            self.options_of.clear()
            for kind, group, hosts in self._ways(option):
                EncoderSearch(self, option, alone, kind, group, hosts).explore()
                if self.late():
                    self.unexplored_s = min(self.unexplored_s, option.bound_s)
                    return

    def _alone(self, option: LanguageOption) -> Hosted | None:
        """The language model's stages as if nothing else were there; None if even so too large."""
        kind: ScheduleKind = "1f1b" if option.sizes.pp > 1 else "no_pipelining"
        candidate = Candidate(
            micro_batch_size=option.micro_batch_size, language=option.sizes, kind=kind
        )
        return self.estimator.language(
            candidate, {}, option.num_microbatches, limit_bytes=self.estimator.limit_bytes
        )

    def _ways(self, option: LanguageOption) -> Iterator[tuple[ScheduleKind, int, tuple[Host, ...]]]:
        """Schedules, and hosts of all encoders, that go with a language model."""
        for kind, group in schedules(self.problem, option.sizes, option.num_microbatches):
            for hosts in assignments(self.problem, option.sizes, kind):
                yield kind, group, hosts
