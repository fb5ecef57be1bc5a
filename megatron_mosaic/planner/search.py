"""Finds the fastest candidates: branch and bound over sizes of modules and their hosts."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import inf
from time import monotonic
from typing import NamedTuple

from megatron_mosaic.cost.costs import ModuleCosts
from megatron_mosaic.layout.plan import ScheduleKind
from megatron_mosaic.planner.bounds import (
    LanguageOption,
    ModuleTimes,
    encoder_work_s,
    language_options,
    module_times,
    pipeline_bound_s,
)
from megatron_mosaic.planner.candidate import Candidate, EncoderChoice, Host
from megatron_mosaic.planner.estimate import Estimate, Estimator, Hosted, Prices
from megatron_mosaic.planner.problem import Problem
from megatron_mosaic.planner.ways import (
    allowed,
    assignments,
    encoder_options,
    homogeneous,
    schedules,
)


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
    prices: Prices,
    *,
    top: int = 3,
    time_limit_s: float | None = None,
    first: bool = False,
    clock: Callable[[], float] = monotonic,
) -> Found:
    """Finds the fastest candidates that fit, and the fastest homogeneous one.

    Without a time limit the result is the optimum of the space, and always the same.

    Args:
        problem: What is asked.
        prices: The cost model.
        top: Candidates to return.
        time_limit_s: Ends the search with the best so far; ``None`` is no limit.
        first: Ends the search with the first candidates that fit.
        clock: Seconds; tests have their own.
    """
    stop_s = inf if time_limit_s is None else clock() + time_limit_s
    run = _Run(problem, prices, top=top, late=lambda: clock() > stop_s)
    run.find_baseline()
    if not (first and run.best.estimates):
        run.find_best(first=first)
    return run.found()


@dataclass(slots=True)
class _Best:
    """The fastest estimates so far, one of each key, the fastest first."""

    top: int
    estimates: list[Estimate]

    @property
    def threshold_s(self) -> float:
        """Time that another one must be below."""
        return self.estimates[-1].step_s if len(self.estimates) == self.top else inf

    def add(self, estimate: Estimate) -> None:
        """Adds an estimate if it is among the fastest; the earlier of equals stays."""
        known = any(estimate.candidate == other.candidate for other in self.estimates)
        if estimate.step_s < self.threshold_s and not known:
            self.estimates.append(estimate)
            self.estimates.sort(key=lambda e: e.step_s)  # stable
            del self.estimates[self.top :]


class _Run:
    """One search: what is known so far."""

    def __init__(
        self, problem: Problem, prices: Prices, *, top: int, late: Callable[[], bool]
    ) -> None:
        self.problem, self.late = problem, late
        self.estimator = Estimator(problem, prices)
        self.best, self.baseline = _Best(top, []), _Best(1, [])
        self.num_estimates = 0
        self.unexplored_s = inf  # bound of what a time limit has left out
        work_s = encoder_work_s(self.estimator)
        self.options = language_options(self.estimator, encoder_work_s=work_s)
        self.shared: dict[tuple[object, ...], list[_Light]] = {}
        self.options_of: dict[tuple[object, ...], list[_Light]] = {}
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
            for candidate in homogeneous(self.problem, option.sizes, option.micro_batch_size):
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
                _Around(self, option, alone, kind, group, hosts).explore()
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


class _Once(NamedTuple):
    """What a rank does once in a step."""

    sync_s: float = 0.0
    optimizer_s: float = 0.0


_NEVER = _Once()


@dataclass(frozen=True, slots=True)
class _Light:
    """An encoder's option as bounds see it.

    Args:
        choice: The option.
        work_s: What it adds to every rank of the language model, in a step.
        column_s: Time of its slowest stage, or what it adds to the first stage, by microbatch.
        before_s: Its time until the first microbatch reaches the language model.
        after_s: Its time after the last one has come back.
        once: Its synchronisation and optimizer.
        num_bytes: What it holds on a rank.
        num_ranks: Ranks apart that it takes.
        pair_s: Time of the pipeline of it and the language model; 0 if that is not known.
    """

    choice: EncoderChoice
    work_s: float = 0.0
    column_s: float = 0.0
    before_s: float = 0.0
    after_s: float = 0.0
    once: _Once = _NEVER
    num_bytes: float = 0.0
    num_ranks: int = 0
    pair_s: float = 0.0


class _Around:
    """Branch and bound over the encoders around one language model."""

    def __init__(
        self,
        run: _Run,
        option: LanguageOption,
        alone: Hosted,
        kind: ScheduleKind,
        group: int,
        hosts: tuple[Host, ...],
    ) -> None:
        self.run, self.option, self.hosts, self.alone = run, option, hosts, alone
        self.kind: ScheduleKind = kind
        self.group = group
        busy = [stage.forward_s + stage.backward_s for stage in alone.stages]
        self.slowest_s, self.path_s = max(busy), sum(busy)
        self.alone_s = run.estimator.pipeline_s(alone, option.num_microbatches)
        self.alone_bytes = max(map(alone.held_bytes, range(len(busy))))
        self.once = _longest_once(alone)
        # Another split may have a fullest stage with fewer weights, but not on average.
        count = len(alone.stages)
        self.average_once = _Once(
            sum(stage.sync_s for stage in alone.stages) / count,
            sum(stage.optimizer_s for stage in alone.stages) / count,
        )
        self.room_bytes = run.estimator.limit_bytes - option.average_bytes
        self.found: Estimate | None = None

    def explore(self) -> None:
        """Finds the best sizes of the encoders, and adds the result to the run's best."""
        spare = self.run.problem.num_gpus - self.option.sizes.num_ranks
        levels = []
        for name, host in zip(self.run.problem.encoders, self.hosts, strict=True):
            options = self._options(name, host, spare)
            if not options:
                return
            levels.append(options)
        least = [_least(options) for options in levels]
        if self.bound_s(least) < self._threshold_s():
            self._descend(levels, [], least, spare)
        if self.found is not None:
            self.run.best.add(self.found)

    def _options(self, name: str, host: Host, spare: int) -> list[_Light]:
        """Options of one encoder, the most promising first.

        Several ways to place encoders ask for the same; what was too slow for one of them is for
        the next, as the best time only falls.
        """
        key = (name, host, self.option, self.kind, self.group)
        if key not in self.run.options_of:
            self.run.options_of[key] = self._promising(name, host, spare)
        return self.run.options_of[key]

    def _promising(self, name: str, host: Host, spare: int) -> list[_Light]:
        option, problem = self.option, self.run.problem
        num_samples = self.group * option.micro_batch_size * option.sizes.dp
        key = (name, host, option.sizes, num_samples, self.kind, spare)
        if key not in self.run.shared:
            found = []
            for choice in encoder_options(
                problem, name, host, option.sizes, num_samples=num_samples
            ):
                light = self._light(choice)
                if light is not None:
                    found.append(light)
            self.run.shared[key] = found if host == "apart" else _undominated(found)
        # What is no better alone is no better with others.
        promising = [o for o in self.run.shared[key] if self.bound_s([o]) < self._threshold_s()]
        if host == "apart":
            exact = [found for light in promising if (found := self._exact(light)) is not None]
            # Of one stage each, what is faster in every way is so with the language model too.
            single = [light for light in exact if light.choice.sizes.pp == 1]
            several = [light for light in exact if light.choice.sizes.pp > 1]
            promising = [*_undominated_apart(single, least=self.once), *several]
            promising = [self._with_pair(light) for light in promising]
            promising = _undominated_apart(promising, least=self.once)
        return sorted(promising, key=lambda light: self.bound_s([light]))

    def _exact(self, light: _Light) -> _Light | None:
        """An option on ranks of its own as it is estimated; None if it does not fit."""
        hosted = self._hosted(light.choice)
        if hosted is None:
            return None
        stages, group = hosted.stages, self.group
        hops_s = [*(stage.hop_s for stage in stages[:-1]), hosted.entry_s]
        back_s = sum(stage.backward_s for stage in stages)
        return replace(
            light,
            column_s=max(stage.forward_s + stage.backward_s for stage in stages) / group,
            before_s=(sum(stage.forward_s for stage in stages) + sum(hops_s)) / group,
            after_s=(back_s + sum(hops_s)) / group if stages[-1].backward_s else back_s / group,
            once=_longest_once(hosted),
        )

    def _with_pair(self, light: _Light) -> _Light:
        """An option with the time of the pipeline of it and the language model alone."""
        hosted = self._hosted(light.choice)
        pair_s = self.run.estimator.pipeline_s(
            self.alone, self.option.num_microbatches, encoder=hosted
        )
        return replace(light, pair_s=pair_s)

    def _hosted(self, choice: EncoderChoice) -> Hosted | None:
        estimator = self.run.estimator
        return estimator.encoder(
            self._candidate([choice]),
            choice,
            self.option.num_microbatches,
            limit_bytes=estimator.limit_bytes,
        )

    def _light(self, choice: EncoderChoice) -> _Light | None:
        estimator, option = self.run.estimator, self.option
        if choice.sizes.pp > 1:
            num_samples = self.group * option.micro_batch_size * option.sizes.dp
            costs = estimator.encoder_costs(choice, num_samples)
            times = self.run.times(costs)
            return _Light(
                choice,
                column_s=max(times.total_s / choice.sizes.pp, times.longest_s) / self.group,
                before_s=times.forward_s / self.group,
                after_s=(times.total_s - times.forward_s) / self.group,
                num_ranks=choice.sizes.num_ranks,
            )
        hosted = self._hosted(choice)
        if hosted is None or hosted.held_bytes(0) > estimator.limit_bytes:
            return None
        stage, held_bytes = hosted.stages[0], hosted.held_bytes(0)
        once = _longest_once(hosted)
        if choice.host == "language" or (choice.shares and self.group > 1):
            work_s = hosted.busy_s * option.num_microbatches / self.group
            return _Light(choice, work_s, once=once, num_bytes=held_bytes)
        busy_s = hosted.busy_s if choice.shares else stage.forward_s + stage.backward_s
        return _Light(
            choice,
            column_s=busy_s / self.group,
            before_s=stage.forward_s / self.group,
            after_s=stage.backward_s / self.group,
            once=once,
            num_bytes=held_bytes,
            num_ranks=0 if choice.shares else choice.sizes.num_ranks,
        )

    def _descend(
        self,
        levels: Sequence[list[_Light]],
        taken: list[_Light],
        least: Sequence[_Light],
        spare: int,
    ) -> None:
        """Chooses an option of the first level, then of the others.

        Args:
            levels: Options of the encoders that are still open.
            taken: Of the others.
            least: For each open encoder the least that any of its options takes.
            spare: Ranks that are free.
        """
        if not levels:
            self._leaf(taken)
            return
        rest = least[1:]
        rest_ranks = sum(t.num_ranks for t in rest if t.choice.host == "apart")
        for light in levels[0]:
            if self.run.late():
                return
            ranks = light.num_ranks if light.choice.host == "apart" else 0
            if ranks + rest_ranks > spare or not _blocks_agree(taken, light):
                continue
            everywhere = [t for t in (*taken, light, *rest) if t.choice.host == "language"]
            if sum(t.num_bytes for t in everywhere) > self.room_bytes:
                continue
            if self.bound_s([*taken, light, *rest]) < self._threshold_s():
                self._descend(levels[1:], [*taken, light], rest, spare - ranks)

    def _leaf(self, taken: list[_Light]) -> None:
        candidate = self._candidate([light.choice for light in taken])
        if not allowed(self.run.problem, candidate):
            return
        estimate = self.run.estimate(candidate)
        if estimate is not None and estimate.step_s < self._threshold_s():
            self.found = estimate

    def _threshold_s(self) -> float:
        own = self.found.step_s if self.found else inf
        return min(own, self.run.best.threshold_s)

    def bound_s(self, taken: Sequence[_Light]) -> float:
        """Time of a step below which no candidate with these encoders can be."""
        shared = [t for t in taken if t.choice.shares]
        apart = [t for t in taken if t.choice.host == "apart"]
        together = [t for t in taken if t.choice.host == "together"]
        first_s = sum(t.column_s for t in shared)
        pipeline_s, language_once = self._language_s(first_s, fits=self._fits(shared))
        # The language model begins after a task of every encoder, and ends before one: the
        # longest of them may be another one each time.
        before_s = [sum(t.before_s for t in together), *(t.before_s for t in apart)]
        after_s = [sum(t.after_s for t in together), *(t.after_s for t in apart)]
        latency_s = max(before_s) + max(after_s)
        pipeline_s += self.group * latency_s
        slowest_s = max([sum(t.column_s for t in together), *(t.column_s for t in apart)])
        stages = max([t.choice.sizes.pp for t in apart], default=1)
        steady = self.option.num_microbatches - self.group * (self.option.sizes.pp + stages)
        path_s = self.path_s + first_s + latency_s + max(steady, 0) * slowest_s
        pipeline_s = max(pipeline_s, self.option.num_microbatches * slowest_s, path_s)
        if not first_s and self._fits(shared):
            pipeline_s = max([pipeline_s, *(t.pair_s for t in apart)])
        everywhere = [t.once for t in taken if t.choice.host == "language"]
        blocks = [_added([language_once, *everywhere]), _added([t.once for t in together])]
        blocks += [t.once for t in apart]
        once_s = max(b.sync_s for b in blocks) + max(b.optimizer_s for b in blocks)
        return pipeline_s + sum(t.work_s for t in shared) + once_s

    def _fits(self, shared: Sequence[_Light]) -> bool:
        """Whether the language model keeps the split that it has alone."""
        held_bytes = self.alone_bytes + sum(t.num_bytes for t in shared)
        return held_bytes <= self.run.estimator.limit_bytes

    def _language_s(self, first_s: float, *, fits: bool) -> tuple[float, _Once]:
        """Time of the language model's pipeline, and of what it does once in a step.

        Args:
            first_s: What encoders add to a microbatch on the first stage.
            fits: Whether its layers are split as if it were alone.
        """
        if not first_s and fits:
            return self.alone_s, self.once
        # Its layers are split anew, and the closed form depends on how.
        num_stages = self.option.sizes.pp
        pipeline_s = pipeline_bound_s(
            total_s=self.path_s + first_s,
            slowest_s=max(self.slowest_s, (self.path_s + first_s) / num_stages),
            forward_share=1.0 if first_s else self.option.forward_share,
            num_stages=num_stages,
            num_microbatches=self.option.num_microbatches,
        )
        return pipeline_s, self.average_once

    def _candidate(self, choices: Sequence[EncoderChoice]) -> Candidate:
        return Candidate(
            micro_batch_size=self.option.micro_batch_size,
            language=self.option.sizes,
            encoders=tuple(choices),
            kind=self.kind,
            encoder_group=self.group,
        )


def _longest_once(hosted: Hosted) -> _Once:
    return _Once(
        max(stage.sync_s for stage in hosted.stages),
        max(stage.optimizer_s for stage in hosted.stages),
    )


def _added(parts: Sequence[_Once]) -> _Once:
    return _Once(sum(p.sync_s for p in parts), sum(p.optimizer_s for p in parts))


def _least(options: Sequence[_Light]) -> _Light:
    """What every option takes at least."""
    return _Light(
        options[0].choice,
        work_s=min(o.work_s for o in options),
        column_s=min(o.column_s for o in options),
        before_s=min(o.before_s for o in options),
        after_s=min(o.after_s for o in options),
        once=_Once(min(o.once.sync_s for o in options), min(o.once.optimizer_s for o in options)),
        num_bytes=min(o.num_bytes for o in options),
        num_ranks=min(o.num_ranks for o in options),
        pair_s=min(o.pair_s for o in options),
    )


def _undominated_apart(options: list[_Light], *, least: _Once) -> list[_Light]:
    """Options on ranks of their own that no other one, exactly known, beats.

    Args:
        options: As they are estimated.
        least: What the language model does once in a step; less than that costs nothing.
    """
    kept: list[_Light] = []
    for light in sorted(options, key=lambda o: (o.num_ranks, o.pair_s, o.column_s, o.once)):
        if not any(_beats(other, light, least=least) for other in kept):
            kept.append(light)
    return kept


def _beats(other: _Light, light: _Light, *, least: _Once) -> bool:
    return (
        other.num_ranks <= light.num_ranks
        and other.column_s <= light.column_s
        and other.before_s <= light.before_s
        and other.after_s <= light.after_s
        and other.pair_s <= light.pair_s
        and other.once.sync_s <= max(light.once.sync_s, least.sync_s)
        and other.once.optimizer_s <= max(light.once.optimizer_s, least.optimizer_s)
    )


def _undominated(options: list[_Light]) -> list[_Light]:
    """Options that no other one beats in everything; the first of equals."""
    kept: list[_Light] = []
    for light in sorted(options, key=lambda o: (o.work_s, o.column_s, o.num_bytes)):
        if not any(
            other.work_s <= light.work_s
            and other.column_s <= light.column_s
            and other.before_s <= light.before_s
            and other.after_s <= light.after_s
            and other.once.sync_s <= light.once.sync_s
            and other.once.optimizer_s <= light.once.optimizer_s
            and other.num_bytes <= light.num_bytes
            and other.num_ranks == light.num_ranks
            for other in kept
        ):
            kept.append(light)
    return kept


def _blocks_agree(taken: Sequence[_Light], light: _Light) -> bool:
    """Whether encoders that run together have as many ranks as each other."""
    if light.choice.host != "together":
        return True
    return all(
        other.num_ranks == light.num_ranks for other in taken if other.choice.host == "together"
    )
