"""The ``forward_backward`` function that Megatron's loop calls under a plan."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from megatron.core.utils import unwrap_model
from megatron.training.global_vars import get_args

from megatron_mosaic.comm.boundary import Samples
from megatron_mosaic.engine.lanes import LaneWalk, LaneWalker, in_lanes
from megatron_mosaic.engine.progress import Progress
from megatron_mosaic.engine.walk import Rows, Walker
from megatron_mosaic.errors import HostError
from megatron_mosaic.host.data.facts import SampleFacts
from megatron_mosaic.host.data.reader import StepBatches
from megatron_mosaic.host.data.shares import task_samples
from megatron_mosaic.host.gradients import (
    finalize_gradients,
    finish_gathering_parameters,
    gather_parameters,
)
from megatron_mosaic.host.kept_rows import KeptRows, is_last_step
from megatron_mosaic.host.loss_report import LossReport
from megatron_mosaic.host.moe.dispatch import check_equal_lengths
from megatron_mosaic.host.moe.metrics import MoeMetrics
from megatron_mosaic.host.reports import StepFlops
from megatron_mosaic.host.runner import ModuleRunner, StepWork
from megatron_mosaic.host.runtime import Runtime
from megatron_mosaic.layout.ownership import count_rows
from megatron_mosaic.layout.placement import LANGUAGE
from megatron_mosaic.layout.sequences import SampleSequence
from megatron_mosaic.schedule.ahead import Part, prologue_of, steps_after_prologue
from megatron_mosaic.schedule.build import build_schedule
from megatron_mosaic.schedule.graph import Stage
from megatron_mosaic.schedule.schedule import Schedule
from megatron_mosaic.schedule.steps import Step, steps_of

Works = Mapping[Stage, StepWork]


class _Walk(NamedTuple):
    """What this rank walks at a time; where its modules run at the same time, in lanes too."""

    steps: tuple[Step, ...]
    in_lanes: LaneWalk | None = None


class PlanForwardBackward:
    """Executes the plan's schedule on this rank, with the stock function's arguments."""

    def __init__(self, runtime: Runtime, *, flops: StepFlops, progress: Progress) -> None:
        self._runtime = runtime
        self._flops = flops
        self._progress = progress
        self._report = LossReport(runtime.host_group)
        self._moe_metrics = MoeMetrics(runtime.host_group)
        self._kept = KeptRows(runtime.randomness)
        self._schedule = cache(self._build_schedule)
        self._steps = cache(self._part_of_steps)

    def select(self, *unused: Any, **also_unused: Any) -> Callable[..., list[dict]]:
        """Stands for ``get_forward_backward_func``, whatever sizes it is asked for."""
        return self

    def __call__(
        self,
        *,
        forward_step_func: Callable[..., Any],
        data_iterator: Iterator[StepBatches],
        model: torch.nn.Module | Sequence[torch.nn.Module],
        num_microbatches: int,
        forward_only: bool = False,
        collect_non_loss_data: bool = False,
        first_val_step: bool | None = None,
        force_all_reduce: bool | None = False,
        **sizes: Any,
    ) -> list[dict[str, torch.Tensor]]:
        """Runs one step.

        Args:
            forward_step_func: The script's.
            data_iterator: Yields this rank's share of a step.
            model: The rank's MosaicModel.
            num_microbatches: Global microbatches of the step.
            forward_only: Evaluation.
            collect_non_loss_data: Not supported.
            first_val_step: Whether an evaluation step is the first of its phase.
            force_all_reduce: Whether replicas need whole gradients.
            sizes: Sequence lengths and batch size, which the plan and the model know.

        Returns:
            The losses of the whole batch as one entry, the same on every rank.

        Raises:
            HostError: Non-loss data is asked for, no data is left, two modules report a loss of one
                name, or replicas that gather each other's tokens have sequences of unequal length.
            LayoutError: Modules count different rows of a sample.

        Note:
            Collective over the world.
        """
        if collect_non_loss_data:
            raise HostError(
                "forward_backward: collect_non_loss_data=True must be False under a plan; "
                "remove process_non_loss_data_func from the script's call of pretrain"
            )
        (top,) = unwrap_model(model if isinstance(model, Sequence) else [model])
        schedule = self._schedule(num_microbatches, forward_only)
        batches = _next_step(data_iterator)
        part = self._kept.part(schedule, batches, is_last=is_last_step(get_args()))
        self._begin(batches, schedule)
        hand_out = partial(
            self._hand_out, schedule, forward_step_func, top.config, first_val_step=first_val_step
        )
        with self._step(schedule, part):
            works = self._walk(schedule, part, batches, hand_out)
            return self._close(works, forward_only, force_all_reduce=force_all_reduce)

    def _begin(self, batches: StepBatches, schedule: Schedule) -> None:
        """Takes what differs between steps: the rows of their samples, and who makes them."""
        runtime, rows = self._runtime, batches.rows
        self._check_dispatch(rows)
        runtime.randomness.unpark()
        runtime.channels.begin(
            rows,
            schedule=schedule,
            owners=batches.owners,
            sequences=self._sequences(batches),
        )
        if not schedule.forward_only:
            self._flops.of_rows = {
                name: sum(map(count_rows, samples)) * runtime.row_facts[name].flops
                for name, samples in rows.items()
            }
            self._flops.trained = runtime.trained.get(LANGUAGE, {})
            self._flops.sequence_length = runtime.row_facts[LANGUAGE].sequence_length

    def _sequences(self, batches: StepBatches) -> tuple[SampleSequence, ...]:
        if self._runtime.plan.language.attention is None:
            return ()
        return tuple(facts.sequence for facts in batches.facts)

    def _walk(
        self, schedule: Schedule, part: Part, batches: StepBatches, hand_out: Callable[..., Works]
    ) -> Works:
        """Walks the steps of the schedule. Returns what was done of this step.

        Modules that run ahead do so on the next step's samples; before the first step also on its.
        """
        prologue, rest = self._steps(schedule.num_microbatches, schedule.forward_only, part)
        # What is kept waits for training to go on while evaluation runs on its own data.
        kept = self._kept.take(part) if schedule.ahead else {}
        if prologue.steps:
            hand_out(dict.fromkeys(schedule.ahead, batches))
            kept = self._launch(prologue, schedule, {})
        before = self._runtime.randomness.states_of(schedule.ahead)
        following = None if Part.ENDS in part else batches.ahead
        data = {name: batches for name in self._runtime.hosted if name not in schedule.ahead}
        if schedule.ahead and following is not None:
            self._runtime.channels.begin_ahead(
                following.rows, schedule=schedule, owners=following.owners
            )
            data |= dict.fromkeys(schedule.ahead, following)
        works = hand_out(data)
        made = self._launch(rest, schedule, kept, first=len(prologue.steps))
        if schedule.ahead and following is not None:
            self._kept.put(made, of=following, before=before)
        self._progress.close_step(len(prologue.steps) + len(rest.steps))
        return works

    def _hand_out(
        self,
        schedule: Schedule,
        forward_step_func: Callable[..., Any],
        config: Any,
        data: Mapping[str, StepBatches],
        *,
        first_val_step: bool | None,
    ) -> Works:
        """Gives every stage its work, with what Megatron's loop sets in the config it knows.

        Args:
            data: Data of each module that has work.
        """
        works = {
            stage: self._work(
                runner,
                schedule,
                data[stage.module],
                forward_step_func,
                first_val_step=first_val_step,
            )
            for stage, runner in self._runtime.runners.items()
            if stage.module in data
        }
        for stage, work in works.items():
            runner = self._runtime.runners[stage]
            runner.config.grad_scale_func = config.grad_scale_func
            runner.config.timers = config.timers
            runner.begin(work)
            gather_parameters(runner.wrapped)
        return works

    @contextmanager
    def _step(self, schedule: Schedule, part: Part) -> Iterator[None]:
        """Lets others see that a step runs."""
        self._progress.begin_step(
            # Without training there is no current iteration.
            getattr(get_args(), "curr_iteration", -1) + 1,
            num_microbatches=schedule.num_microbatches,
            forward_only=schedule.forward_only,
            part=part,
        )
        yield
        self._progress.end_step()

    def _launch(self, walk: _Walk, schedule: Schedule, kept: Rows, *, first: int = 0) -> Rows:
        """Walks some steps. Returns what was made for the next step of training."""
        runtime = self._runtime
        channels = runtime.channels.open
        if runtime.lanes is None or walk.in_lanes is None:
            walker = Walker(
                runners=runtime.runners,
                channels=channels,
                progress=self._progress,
                schedule=schedule,
                kept=kept,
            )
            return walker.walk(walk.steps, first=first)
        lane_walker = LaneWalker(
            lanes=runtime.lanes,
            runners=runtime.runners,
            channels=channels,
            progress=self._progress,
            schedule=schedule,
            kept=kept,
        )
        return lane_walker.walk_in_lanes(walk.in_lanes, first=first)

    def _check_dispatch(self, rows: Mapping[str, Samples]) -> None:
        args, plan = get_args(), self._runtime.plan
        if args.num_experts is not None and args.moe_token_dispatcher_type == "allgather":
            for samples in rows.values():
                check_equal_lengths(
                    list(map(count_rows, samples)),
                    language=plan.language,
                    samples_per_replica=plan.micro_batch_size,
                )

    def _build_schedule(self, num_microbatches: int, forward_only: bool) -> Schedule:
        return build_schedule(
            self._runtime.plan, num_microbatches=num_microbatches, forward_only=forward_only
        )

    def _part_of_steps(
        self, num_microbatches: int, forward_only: bool, part: Part
    ) -> tuple[_Walk, _Walk]:
        schedule = self._schedule(num_microbatches, forward_only)
        steps = steps_of(self._runtime.plan, schedule, self._runtime.rank)
        return (
            self._as_walk(prologue_of(steps, schedule, part), schedule),
            self._as_walk(steps_after_prologue(steps, schedule, part), schedule),
        )

    def _as_walk(self, steps: tuple[Step, ...], schedule: Schedule) -> _Walk:
        lanes, plan, rank = self._runtime.lanes, self._runtime.plan, self._runtime.rank
        if lanes is None:
            return _Walk(steps)
        return _Walk(steps, in_lanes(plan, schedule, steps, rank, races=lanes.races is not None))

    def _work(
        self,
        runner: ModuleRunner,
        schedule: Schedule,
        batches: StepBatches,
        forward_step_func: Callable[..., Any],
        *,
        first_val_step: bool | None,
    ) -> StepWork:
        tasks = [t for t in schedule.tasks[self._runtime.rank] if t[1:3] == runner.stage]
        forward = [task.microbatches for task in tasks if task.kind == "F"]
        backward = [task for task in tasks if task.kind == "B"]
        channels, name, groups = self._runtime.channels, runner.name, runner.groups
        makes_rows = not runner.boundary.makes_loss
        return StepWork(
            forward_step_func=forward_step_func,
            num_microbatches=schedule.num_microbatches,
            forward_only=schedule.forward_only,
            batches=batches.batches[name],
            rows={
                each: channels.rows_made(name, each)
                for each in forward
                if makes_rows and groups.is_last_stage
            },
            items={each: channels.items_made(name, each) for each in forward if makes_rows},
            facts={each: self._facts_of(name, each, batches) for each in forward},
            gradient_to=self._awaiting_gradient(runner.stage) if backward else frozenset(),
            last_backward=backward[-1] if backward else None,
            first_val_step=first_val_step,
        )

    def _facts_of(
        self, name: str, task: tuple[int, ...], batches: StepBatches
    ) -> Sequence[SampleFacts]:
        """What is known of the samples that this rank's replica of the language model runs."""
        if name != LANGUAGE:
            return ()
        plan = self._runtime.plan
        samples = task_samples(
            plan.language,
            task,
            dp=self._runtime.hosted[name].position.dp,
            samples_per_replica=plan.micro_batch_size,
            size=plan.micro_batch_size * plan.language.data_parallel_size,
        )
        return batches.facts[slice(*samples)]

    def _awaiting_gradient(self, stage: Stage) -> frozenset[str]:
        """Modules that wait for the gradient of what they sent a stage."""
        return frozenset(
            edge.source
            for kind, edge in self._runtime.channels.open
            if kind == "gradient" and edge[2:] == stage
        )

    def _close(
        self, works: Works, forward_only: bool, *, force_all_reduce: bool | None
    ) -> list[dict[str, torch.Tensor]]:
        runtime = self._runtime
        language = runtime.plan.language
        replicas = language.data_parallel_size
        spoken = {
            stage.module: work for stage, work in works.items() if runtime.runners[stage].speaks
        }
        losses, num_tokens = self._report.reduce(
            {name: work.losses for name, work in spoken.items()},
            num_tokens=spoken[LANGUAGE].num_tokens if LANGUAGE in spoken else 0,
            replicas=replicas,
            forward_only=forward_only,
        )
        for runner in runtime.modules.values():
            finish_gathering_parameters(runner.wrapped)
        if not forward_only:
            finalize_gradients(
                runtime.modules,
                runtime.hosted,
                num_tokens=num_tokens,
                per_token_loss=get_args().calculate_per_token_loss,
                loss_replicas=replicas * language.context_parallel_size,
                force_all_reduce=bool(force_all_reduce),
            )
            if get_args().num_experts is not None:
                self._moe_metrics.reduce(runtime.hosted.get(LANGUAGE))
        runtime.randomness.park()
        self._report.check()
        return losses


def _next_step(data_iterator: Iterator[StepBatches]) -> StepBatches:
    """Takes the next step's data. The end is an error here, on every rank alike."""
    try:
        return next(data_iterator)
    except StopIteration:
        raise HostError(
            "data: remaining samples=0 must be a whole step's; give more data or a loader that "
            "repeats it, or lower --train-iters or --eval-iters"
        ) from None
