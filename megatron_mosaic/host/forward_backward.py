"""The ``forward_backward`` function that Megatron's loop calls under a plan."""

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import torch
from megatron.core.utils import unwrap_model
from megatron.training.global_vars import get_args

from megatron_mosaic.engine.trace import TaskTrace
from megatron_mosaic.engine.walk import Walker
from megatron_mosaic.errors import HostError
from megatron_mosaic.host.data.reader import StepBatches
from megatron_mosaic.host.gradients import (
    LossReport,
    finalize_gradients,
    finish_gathering_parameters,
    gather_parameters,
)
from megatron_mosaic.host.llava import LANGUAGE
from megatron_mosaic.host.reports import StepFlops
from megatron_mosaic.host.runner import ModuleRunner, StepWork
from megatron_mosaic.host.runtime import Runtime
from megatron_mosaic.schedule.build import build_schedule
from megatron_mosaic.schedule.schedule import Schedule
from megatron_mosaic.schedule.steps import Step, steps_of
from megatron_mosaic.schedule.task import Task


class PlanForwardBackward:
    """Executes the plan's schedule on this rank, with the stock function's arguments."""

    def __init__(
        self, runtime: Runtime, *, flops: StepFlops, trace: TaskTrace | None = None
    ) -> None:
        self._runtime = runtime
        self._flops = flops
        self._trace = trace
        self._report = LossReport(runtime.host_group)
        self._prepared = cache(self._prepare)

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
            HostError: Non-loss data is asked for, or no data is left.
            LayoutError: Modules read different images for a sample.

        Note:
            Collective over the world.
        """
        if collect_non_loss_data:
            raise HostError(
                "forward_backward: collect_non_loss_data=True must be False under a plan; "
                "remove process_non_loss_data_func from the script's call of pretrain"
            )
        runtime = self._runtime
        (top,) = unwrap_model(model if isinstance(model, Sequence) else [model])
        schedule, steps = self._prepared(num_microbatches, forward_only)
        batches = _next_step(data_iterator)
        runtime.randomness.unpark()
        self._begin_boundaries(batches.images, schedule)
        if not forward_only:
            self._flops.num_images = sum(batches.images)
        works = {}
        for name, runner in runtime.runners.items():
            runner.config.grad_scale_func = top.config.grad_scale_func
            runner.config.timers = top.config.timers
            works[name] = self._work(
                runner, schedule, batches, forward_step_func, first_val_step=first_val_step
            )
            runner.begin(works[name])
            gather_parameters(runner.model)
        if self._trace is not None:
            self._trace.begin(forward_only=forward_only)
        Walker(runners=runtime.runners, channels=runtime.channels.open, observe=self._trace).walk(
            steps
        )
        return self._close(works.get(LANGUAGE), forward_only, force_all_reduce=force_all_reduce)

    def _begin_boundaries(self, images: Sequence[int], schedule: Schedule) -> None:
        runner = next(iter(self._runtime.runners.values()), None)
        if runner is not None:
            rows = tuple(count * runner.boundary.rows_per_image for count in images)
            self._runtime.channels.begin(rows, schedule=schedule)

    def _prepare(
        self, num_microbatches: int, forward_only: bool
    ) -> tuple[Schedule, tuple[Step, ...]]:
        plan = self._runtime.plan
        schedule = build_schedule(
            plan, num_microbatches=num_microbatches, forward_only=forward_only
        )
        return schedule, steps_of(plan, schedule, self._runtime.rank)

    def _work(
        self,
        runner: ModuleRunner,
        schedule: Schedule,
        batches: StepBatches,
        forward_step_func: Callable[..., Any],
        *,
        first_val_step: bool | None,
    ) -> StepWork:
        tasks = [t for t in schedule.tasks[self._runtime.rank] if t.module == runner.name]
        backward = [task for task in tasks if task.kind == "B"]
        return StepWork(
            forward_step_func=forward_step_func,
            num_microbatches=schedule.num_microbatches,
            forward_only=schedule.forward_only,
            batches=batches.batches[runner.name],
            rows=self._rows(runner, tasks),
            last_backward=backward[-1] if backward else None,
            first_val_step=first_val_step,
        )

    def _rows(self, runner: ModuleRunner, tasks: Sequence[Task]) -> dict[tuple[int, ...], int]:
        if runner.name == LANGUAGE:
            return {}
        return {
            task.microbatches: self._runtime.channels.rows_made(runner.name, task.microbatches)
            for task in tasks
            if task.kind == "F"
        }

    def _close(
        self, language: StepWork | None, forward_only: bool, *, force_all_reduce: bool | None
    ) -> list[dict[str, torch.Tensor]]:
        runtime = self._runtime
        replicas = runtime.plan.language.data_parallel_size
        speaks = language is not None and runtime.runners[LANGUAGE].speaks
        losses, num_tokens = self._report.reduce(
            language.losses if language is not None and speaks else [],
            num_tokens=language.num_tokens if language is not None and speaks else 0,
            replicas=replicas,
            forward_only=forward_only,
        )
        for runner in runtime.runners.values():
            finish_gathering_parameters(runner.model)
        if not forward_only:
            finalize_gradients(
                runtime.runners,
                num_tokens=num_tokens,
                per_token_loss=get_args().calculate_per_token_loss,
                language_replicas=replicas,
                force_all_reduce=bool(force_all_reduce),
            )
        runtime.randomness.park()
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
