"""The best encoders around one language model: branch and bound over their sizes."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import TYPE_CHECKING, NamedTuple

from megatron_mosaic.layout.plan import ScheduleKind
from megatron_mosaic.planner.balance import with_items
from megatron_mosaic.planner.bounds import LanguageOption, pipeline_bound_s
from megatron_mosaic.planner.candidate import Candidate, EncoderChoice, Host
from megatron_mosaic.planner.closed_form import Hosted
from megatron_mosaic.planner.estimate import Estimate
from megatron_mosaic.planner.placements import allowed, encoder_options

if TYPE_CHECKING:
    from megatron_mosaic.planner.search import Run


class _Once(NamedTuple):
    """What a rank does once in a step."""

    sync_s: float = 0.0
    optimizer_s: float = 0.0


_NEVER = _Once()


@dataclass(frozen=True, slots=True)
class Light:
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


class EncoderSearch:
    """Branch and bound over the encoders around one language model."""

    def __init__(
        self,
        run: "Run",
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

    def _options(self, name: str, host: Host, spare: int) -> list[Light]:
        """Options of one encoder, the most promising first.

        Several ways to place encoders ask for the same; what was too slow for one of them is for
        the next, as the best time only falls.
        """
        key = (name, host, self.option, self.kind, self.group)
        if key not in self.run.options_of:
            self.run.options_of[key] = self._promising(name, host, spare)
        return self.run.options_of[key]

    def _promising(self, name: str, host: Host, spare: int) -> list[Light]:
        option, problem = self.option, self.run.problem
        num_samples = self.group * option.micro_batch_size * option.sizes.dp
        key = (name, host, option.sizes, num_samples, self.kind, spare)
        if key not in self.run.shared:
            found = []
            for choice in encoder_options(
                problem, name, host, option.sizes, num_samples=num_samples
            ):
                light = self._light(
                    with_items(choice, option.sizes, self.run.estimator, num_samples=num_samples)
                )
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

    def _exact(self, light: Light) -> Light | None:
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

    def _with_pair(self, light: Light) -> Light:
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

    def _light(self, choice: EncoderChoice) -> Light | None:
        estimator, option = self.run.estimator, self.option
        if choice.sizes.pp > 1:
            num_samples = self.group * option.micro_batch_size * option.sizes.dp
            costs = estimator.encoder_costs(choice, num_samples)
            times = self.run.times(costs)
            return Light(
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
            return Light(choice, work_s, once=once, num_bytes=held_bytes)
        busy_s = hosted.busy_s if choice.shares else stage.forward_s + stage.backward_s
        return Light(
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
        levels: Sequence[list[Light]],
        taken: list[Light],
        least: Sequence[Light],
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

    def _leaf(self, taken: list[Light]) -> None:
        candidate = self._candidate([light.choice for light in taken])
        if not allowed(self.run.problem, candidate):
            return
        estimate = self.run.estimate(candidate)
        if estimate is not None and estimate.step_s < self._threshold_s():
            self.found = estimate

    def _threshold_s(self) -> float:
        own = self.found.step_s if self.found else inf
        return min(own, self.run.best.threshold_s)

    def bound_s(self, taken: Sequence[Light]) -> float:
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

    def _fits(self, shared: Sequence[Light]) -> bool:
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


def _least(options: Sequence[Light]) -> Light:
    """What every option takes at least."""
    return Light(
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


def _undominated_apart(options: list[Light], *, least: _Once) -> list[Light]:
    """Options on ranks of their own that no other one, exactly known, beats.

    Args:
        options: As they are estimated.
        least: What the language model does once in a step; less than that costs nothing.
    """
    kept: list[Light] = []
    for light in sorted(options, key=lambda o: (o.num_ranks, o.pair_s, o.column_s, o.once)):
        if not any(_beats(other, light, least=least) for other in kept):
            kept.append(light)
    return kept


def _beats(other: Light, light: Light, *, least: _Once) -> bool:
    return (
        other.num_ranks <= light.num_ranks
        and other.column_s <= light.column_s
        and other.before_s <= light.before_s
        and other.after_s <= light.after_s
        and other.pair_s <= light.pair_s
        and other.once.sync_s <= max(light.once.sync_s, least.sync_s)
        and other.once.optimizer_s <= max(light.once.optimizer_s, least.optimizer_s)
    )


def _undominated(options: list[Light]) -> list[Light]:
    """Options that no other one beats in everything; the first of equals."""
    kept: list[Light] = []
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


def _blocks_agree(taken: Sequence[Light], light: Light) -> bool:
    """Whether encoders that run together have as many ranks as each other."""
    if light.choice.host != "together":
        return True
    return all(
        other.num_ranks == light.num_ranks for other in taken if other.choice.host == "together"
    )
