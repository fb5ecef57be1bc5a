"""Runs the tasks of one stage of a module through upstream's forward and backward step."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import copy
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.pipeline_parallel.schedules import (
    backward_step,
    deallocate_output_tensor,
    forward_step,
)
from megatron.core.utils import GlobalMemoryBuffer, get_model_config, make_viewless_tensor

from megatron_mosaic.host.agreement import RankError
from megatron_mosaic.host.data.facts import SampleFacts
from megatron_mosaic.host.families.family import Batch, ModuleBoundary
from megatron_mosaic.host.faults.results import results_of
from megatron_mosaic.host.groups import ModuleGroups
from megatron_mosaic.host.loss import with_loss_over_context
from megatron_mosaic.host.parallel_state_scope import ParallelStateScope
from megatron_mosaic.host.randomness import ModuleRandomness
from megatron_mosaic.schedule.graph import Stage
from megatron_mosaic.schedule.task import Task


@dataclass(kw_only=True)
class StepWork:
    """What the tasks of one stage have in common in a step.

    Args:
        forward_step_func: The script's.
        num_microbatches: Microbatches of the step.
        forward_only: Evaluation: nothing is kept for a backward pass.
        batches: What each forward task of the module reads; None on ranks that are sent it by
            their tensor-parallel rank 0.
        rows: Boundary rows that each task of an encoder's last stage makes on this rank.
        items: Items, such as images, that this rank's replica of an encoder takes in each task; a
            module with a loss has none, it runs without rows too.
        facts: What is known of the samples of this rank's replica in each task.
        gradient_to: Modules that wait for the gradient of what they sent this one; its own name
            stands for its previous stage.
        last_backward: The stage's last backward task.
        losses: What the loss function reported, one entry for each microbatch.
        num_tokens: Tokens that count in the loss of this rank.
    """

    forward_step_func: Callable[..., Any]
    num_microbatches: int
    forward_only: bool
    batches: Mapping[tuple[int, ...], Batch | None]
    rows: Mapping[tuple[int, ...], int]
    items: Mapping[tuple[int, ...], int]
    facts: Mapping[tuple[int, ...], Sequence[SampleFacts]]
    gradient_to: frozenset[str]
    last_backward: Task | None
    first_val_step: bool | None = None
    losses: list[Any] = field(default_factory=list)
    num_tokens: torch.Tensor | int = 0


@dataclass(frozen=True, slots=True)
class _Live:
    """Ends of the autograd graph of one forward task.

    Args:
        received: What it received, by sender.
        output: What it made: what leaves the stage, or a loss.
        beside: Rows that left beside a loss.
    """

    received: Mapping[str, torch.Tensor]
    output: torch.Tensor
    beside: torch.Tensor | None = None


class ModuleRunner:
    """One stage of a module on this rank.

    Args:
        model: What runs.
        wrapped: What is reduced and optimized: the module with all its stages on this rank.
        groups: Groups of the stage.
        boundary: Translates between its tensors and rows.
        randomness: Random states of the modules on this rank.
        memory_buffer: The module's own scratch memory, if it needs one.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        *,
        wrapped: torch.nn.Module,
        groups: ModuleGroups,
        boundary: ModuleBoundary,
        randomness: ModuleRandomness,
        memory_buffer: GlobalMemoryBuffer | None = None,
    ) -> None:
        self.model = model
        self.wrapped = wrapped
        self.groups = groups
        self.name = groups.placement.name
        self.stage = Stage(self.name, groups.stage)
        self.config = get_model_config(model)
        self.boundary = boundary
        self._scope = ParallelStateScope(groups.collection, memory_buffer=memory_buffer)
        self._randomness = randomness
        self._live: dict[tuple[int, ...], _Live | None] = {}
        self._work: StepWork | None = None

    @property
    def speaks(self) -> bool:
        """Whether this rank reports its replica's losses: one of those that compute them."""
        position = self.groups.position
        return self._makes_loss() and position.tp == 0 and position.cp == 0

    def begin(self, work: StepWork) -> None:
        """Takes the work of the next step."""
        assert not self._live, "a forward task of the former step had no backward task"
        self._work = work

    @contextmanager
    def as_process(self) -> Iterator[None]:
        """Makes the module's groups and random state the process's own."""
        with self._scope.active(), self._randomness.of(self.name):
            yield

    def forward(self, task: Task, received: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
        """Runs a forward task. Returns boundary rows, a hidden state, or None beside a loss."""
        work = self._current_work()
        if work.items.get(task.microbatches) == 0:
            # No image among the samples of this replica: the others run without it.
            self._keep(task, None)
            return None
        self.boundary.begin(work.facts.get(task.microbatches, ()))
        leaves = {source: self._leaf(source, values) for source, values in received.items()}
        with self.as_process(), self._gradient_sync(task), results_of(task):
            output, num_tokens = forward_step(
                self._forward_step_func(work),
                self._reader(work.batches[task.microbatches]),
                self.model,
                work.num_microbatches,
                self._inputs_of(leaves),
                work.losses,
                self.config,
                cp_group_size=self.groups.collection.cp.size(),
                is_first_microbatch=self._is_first(task),
                current_microbatch=task.microbatches[0],
                is_last_stage=self._makes_loss(),
            )
        work.num_tokens = work.num_tokens + num_tokens
        awaited = {source: leaf for source, leaf in leaves.items() if leaf.requires_grad}
        if self._makes_loss():
            beside = self.boundary.rows_beside_loss()
            self._keep(task, _Live(awaited, output, beside))
            return None if beside is None else beside.detach()
        # Megatron's bf16 wrapper turns what leaves a module's last stage into fp32.
        leaving = self._leaving(output).to(self.config.params_dtype)
        if self.groups.is_last_stage:
            self._check_rows(leaving, expected=work.rows[task.microbatches])
        values = leaving.detach()
        self._keep(task, _Live(awaited, self._without_values(leaving)))
        return values

    def backward(self, task: Task, received: torch.Tensor | None) -> Mapping[str, torch.Tensor]:
        """Runs a backward task. Returns the gradient of what its forward task received."""
        live = self._live.pop(task.microbatches)
        if live is None:
            return {}
        if not live.output.requires_grad:
            # Nothing trains on this stage or before it; a later stage does.
            return {source: torch.zeros_like(values) for source, values in live.received.items()}
        sources = list(live.received)
        output, gradient = live.output, received
        if live.beside is not None and received is not None:
            # One backward pass for both: the gradient of this term is what was received.
            output, gradient = output + (live.beside * received).sum(), None
        with self.as_process(), self._gradient_sync(task), results_of(task):
            gradients = backward_step(
                [live.received[source] for source in sources], output, gradient, self.config
            )
        return {
            # No gradient: nothing of it had a part in the loss.
            source: torch.zeros_like(live.received[source]) if gradient is None else gradient
            for source, gradient in zip(sources, gradients, strict=True)
        }

    def _check_rows(self, rows: torch.Tensor, *, expected: int) -> None:
        if tuple(rows.shape) != (expected, self.boundary.width):
            raise RankError(
                f"model: rows={tuple(rows.shape)} that {self.name} made must be "
                f"{(expected, self.boundary.width)}, as the data and the model's sizes say; "
                f"give each sample as many special tokens as its encoder makes rows",
                speaker=dist.get_rank(),
            )

    def _current_work(self) -> StepWork:
        assert self._work is not None, "begin() comes before the first task"
        return self._work

    def _makes_loss(self) -> bool:
        return self.boundary.makes_loss and self.groups.is_last_stage

    def _is_first(self, task: Task) -> bool:
        work = self._current_work()
        first = task.microbatches[0] == 0
        if work.first_val_step is None or not work.forward_only:
            return first
        return work.first_val_step and first

    def _keep(self, task: Task, live: _Live | None) -> None:
        if self._current_work().last_backward is not None:
            self._live[task.microbatches] = live

    def _without_values(self, output: torch.Tensor) -> torch.Tensor:
        """Lets go of an output's values, which only its transfer needs, and keeps its graph."""
        graph = make_viewless_tensor(output, requires_grad=output.requires_grad, keep_graph=True)
        deallocate_output_tensor(graph, self.config.deallocate_pipeline_outputs)
        return graph

    def _reader(self, batch: Batch | None) -> Iterator[Batch] | None:
        if batch is None:
            return None
        # Scripts may take a batch apart, and the next stage on this rank reads it too.
        several = self.groups.placement.virtual_pipeline_model_parallel_size > 1
        return iter([copy(batch) if several else batch])

    def _gradient_sync(self, task: Task) -> AbstractContextManager[None]:
        """Lets a stage's gradients leave only in its last backward task of the step."""
        if task == self._current_work().last_backward:
            return nullcontext()
        wrapper: Any = self.wrapped
        return wrapper.no_sync() if isinstance(wrapper, DistributedDataParallel) else nullcontext()

    def _leaf(self, source: str, values: torch.Tensor) -> torch.Tensor:
        return values.detach().requires_grad_(source in self._current_work().gradient_to)

    def _inputs_of(self, leaves: Mapping[str, torch.Tensor]) -> Any:
        """Returns what ``set_input_tensor`` takes: a hidden state, or what rows stand for."""
        if not leaves:
            return None
        return self.boundary.inputs_of(leaves)

    def _forward_step_func(self, work: StepWork) -> Callable[..., Any]:
        """Returns the script's function; with context parallelism its loss counts all tokens."""
        if not self._makes_loss() or self.groups.collection.cp.size() == 1:
            return work.forward_step_func
        return with_loss_over_context(
            work.forward_step_func,
            group=self.groups.collection.cp,
            per_token=self.config.calculate_per_token_loss,
        )

    def _leaving(self, output: Any) -> torch.Tensor:
        if self.groups.is_last_stage:
            return self.boundary.rows_of(output)
        return self.boundary.hidden_of(output)
