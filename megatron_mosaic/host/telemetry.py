"""What every module does in a step, for the writers that Megatron opened."""

import resource
from collections import deque
from collections.abc import Mapping
from statistics import median
from time import monotonic
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.training.global_vars import get_args, get_tensorboard_writer, get_wandb_writer
from megatron.training.training import training_log as stock_training_log

from megatron_mosaic.engine.trace import RecordedStep, TaskRecorder
from megatron_mosaic.host.reports import StepFlops
from megatron_mosaic.host.runtime import Runtime
from megatron_mosaic.report.deviation import (
    LARGEST_DEVIATION,
    StepTerms,
    deviation_warning,
    predicted_terms,
)
from megatron_mosaic.report.prediction import read_prediction
from megatron_mosaic.report.scalars import (
    RankStep,
    Totals,
    largest_of,
    scalars_of,
    sums_of,
    terms_of,
)
from megatron_mosaic.schedule.graph import Stage
from megatron_mosaic.schedule.plan_program import program_of_plan
from megatron_mosaic.schedule.simulate import PassTimes, covered_s

# The first steps of a run compile and fill caches: they say nothing about the others.
_WARM_UP_STEPS = 3
# A typical step is the median of at least and at most so many.
_FEWEST_STEPS = 3
_MOST_STEPS = 100


class Telemetry:
    """Stands for Megatron's ``training_log``: calls it, then reports the modules beside it.

    Tasks are those of one step of each log interval; the time of a step is that of all. Ranks
    meet once an interval, where Megatron's own timers do.

    Args:
        runtime: This rank's share of the plan.
        flops: Counts the operations of a step.
        recorder: Recorded the tasks.
    """

    def __init__(self, runtime: Runtime, *, flops: StepFlops, recorder: TaskRecorder) -> None:
        self._runtime = runtime
        self._flops = flops
        self._recorder = recorder
        self._prediction = read_prediction(runtime.plan)
        self._predicted = predicted_terms(runtime.plan, self._prediction)
        # Megatron writes and prints on the last rank.
        self._program = program_of_plan(runtime.plan) if _is_last(runtime) else None
        self._num_steps = 0
        self._since_report_s: list[float] = []
        self._warm_s: deque[float] = deque(maxlen=_MOST_STEPS)
        self._warm_terms: deque[StepTerms] = deque(maxlen=_MOST_STEPS)
        self._has_warned = False

    def __call__(
        self,
        loss_dict: Any,
        total_loss_dict: Any,
        learning_rate: Any,
        iteration: int,
        *others: Any,
        **named: Any,
    ) -> Any:
        """Logs a step as Megatron does; at a log interval, the modules as well.

        Note:
            Collective over the world, at a log interval.
        """
        step_s = monotonic() - self._recorder.began_s
        self._num_steps += 1
        # The first step is no measure of any.
        if self._num_steps > 1:
            self._since_report_s.append(step_s)
        if self._num_steps > _WARM_UP_STEPS:
            self._warm_s.append(step_s)
        returned = stock_training_log(
            loss_dict, total_loss_dict, learning_rate, iteration, *others, **named
        )
        if iteration % get_args().log_interval == 0 and self._since_report_s:
            self._report(iteration, last_s=step_s)
            self._since_report_s = []
        return returned

    def _report(self, iteration: int, *, last_s: float) -> None:
        # Megatron's log has just waited for the device.
        self._recorder.finish()
        if self._recorder.last is None:
            return
        plan = self._runtime.plan
        own = rank_step(
            self._recorder.last,
            step_s=last_s,
            memory_bytes=_peak_memory_bytes(),
            received_bytes=self._runtime.channels.received_bytes(plan.num_microbatches),
        )
        totals = Totals(
            sums=self._reduced(sums_of(plan, own, rank=self._runtime.rank), dist.ReduceOp.SUM),
            largest=self._reduced(
                largest_of(plan, own, rank=self._runtime.rank), dist.ReduceOp.MAX
            ),
        )
        if self._program is not None:
            terms = terms_of(plan, self._program, totals)
            self._write(totals, terms, iteration)
            self._warn(terms)

    def _reduced(self, values: Mapping[str, float], operation: Any) -> dict[str, float]:
        """Reduces numbers that all ranks have by the same names."""
        reduced = torch.tensor(list(values.values()), dtype=torch.float64)
        dist.all_reduce(reduced, op=operation, group=self._runtime.host_group)
        return dict(zip(values, reduced.tolist(), strict=True))

    def _write(self, totals: Totals, terms: StepTerms, iteration: int) -> None:
        writer, wandb_writer = get_tensorboard_writer(), get_wandb_writer()
        if writer is None and wandb_writer is None:
            return
        scalars = scalars_of(
            self._runtime.plan,
            totals,
            terms=terms,
            step_s=float(np.mean(self._since_report_s)),
            flops=self._flops.by_module(get_args(), self._runtime.plan.global_batch_size),
            prediction=self._prediction,
            predicted=self._predicted,
        )
        if writer is not None:
            for name, value in scalars.items():
                writer.add_scalar(name, value, iteration)
        if wandb_writer is not None:
            wandb_writer.log(scalars, iteration)

    def _warn(self, terms: StepTerms) -> None:
        """Says once that the plan was chosen by a prediction that does not hold here."""
        if self._has_warned or self._predicted is None or not self._warm_s:
            return
        self._warm_terms.append(terms)
        expected_s = self._predicted.step_s
        off_s = abs(median(self._warm_s) - expected_s)
        if len(self._warm_s) < _FEWEST_STEPS or off_s <= LARGEST_DEVIATION * expected_s:
            return
        by_length = sorted(self._warm_terms, key=lambda each: each.step_s)
        warning = deviation_warning(self._predicted, by_length[len(by_length) // 2])
        if warning is not None:
            print(f"warning: mosaic: {warning}", flush=True)
            self._has_warned = True


def rank_step(
    step: RecordedStep, *, step_s: float, memory_bytes: float, received_bytes: Mapping[str, float]
) -> RankStep:
    """What a rank knows of its own step.

    Args:
        step: Its tasks.
        step_s: The whole step, with the optimizer's.
        memory_bytes: Most memory that was in use.
        received_bytes: What boundaries brought, by the module that made the rows.
    """
    passes_s: dict[Stage, PassTimes] = {}
    for (kind, module, stage, _), start_s, end_s in step.spans:
        forward_s, backward_s = passes_s.get(Stage(module, stage), PassTimes(0.0, 0.0))
        own_s = end_s - start_s
        passes_s[Stage(module, stage)] = (
            PassTimes(forward_s + own_s, backward_s)
            if kind == "F"
            else PassTimes(forward_s, backward_s + own_s)
        )
    starts_s = np.array([span.start_s for span in step.spans])
    ends_s = np.array([span.end_s for span in step.spans])
    walked_s = step.begin_s if step.walked_s is None else step.walked_s
    return RankStep(
        step_s=step_s,
        walk_s=walked_s - step.begin_s,
        close_s=(walked_s if step.end_s is None else step.end_s) - step.begin_s,
        busy_s=covered_s(starts_s, ends_s) if step.spans else 0.0,
        passes_s=passes_s,
        memory_bytes=memory_bytes,
        received_bytes=received_bytes,
    )


def _is_last(runtime: Runtime) -> bool:
    return runtime.rank == runtime.plan.world_size - 1


def _peak_memory_bytes() -> float:
    """Most that tensors took of a GPU; without one, most that this process took of its host."""
    if torch.cuda.is_available():
        return float(torch.cuda.max_memory_allocated())
    return 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
