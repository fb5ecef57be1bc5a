"""Walks the steps of a rank: computes, posts transfers, waits for them."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import torch

from megatron_mosaic.comm.pending import Pending
from megatron_mosaic.engine.progress import Progress
from megatron_mosaic.schedule.graph import Stage
from megatron_mosaic.schedule.schedule import Schedule
from megatron_mosaic.schedule.steps import (
    Compute,
    Edge,
    Post,
    Step,
    Transfer,
    TransferKind,
    Wait,
    crosses_steps,
)
from megatron_mosaic.schedule.task import Task


class TaskRunner(Protocol):
    """Runs the tasks of one stage on this rank and keeps what a backward pass needs."""

    def forward(self, task: Task, received: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
        """Runs a forward task.

        Args:
            task: The task.
            received: Activations by the module that sent them; the module's own name stands for
                the previous pipeline stage.

        Returns:
            What leaves the stage: boundary rows ``[tokens, h]``, a hidden state, or nothing.
        """
        ...

    def backward(self, task: Task, received: torch.Tensor | None) -> Mapping[str, torch.Tensor]:
        """Runs a backward task.

        Args:
            task: The task.
            received: Gradient of what left the stage; None on a last stage.

        Returns:
            Gradients of what the forward task received, by the same keys.
        """
        ...


class Channel(Protocol):
    """One direction of one edge: its transfers are posted in microbatch order."""

    def split(
        self, leaving: torch.Tensor | None, microbatches: Sequence[int]
    ) -> Sequence[torch.Tensor | None]:
        """Cuts what one task produced into the parts of its microbatches."""
        ...

    def join(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """Puts what arrived for the microbatches of one task together."""
        ...

    def post(self, microbatch: int, leaving: torch.Tensor | None) -> Pending:
        """Issues this rank's sends and receives of one transfer, without waiting."""
        ...


Channels = Mapping[tuple[TransferKind, Edge], Channel]


Rows = Mapping[Transfer, torch.Tensor | None]


class Walker:
    """Executes one rank's steps once.

    Args:
        runners: Stages on this rank.
        channels: Edges that begin or end on this rank.
        progress: Is told where the rank is.
        schedule: The schedule that the steps are of.
        kept: What modules that run ahead made of this step's samples before it began.
    """

    def __init__(
        self,
        *,
        runners: Mapping[Stage, TaskRunner],
        channels: Channels,
        progress: Progress,
        schedule: Schedule,
        kept: Rows,
    ) -> None:
        self._schedule = schedule
        self._runners = runners
        self._channels = channels
        self._progress = progress
        self._leaving: dict[Transfer, torch.Tensor | None] = dict(kept)
        self._ahead: dict[Transfer, torch.Tensor | None] = {}
        self._awaited: dict[Transfer, Pending] = {}
        self._under_way: list[Pending] = []
        self._to_be_awaited: set[Transfer] = set()
        self._arrived: dict[Transfer, torch.Tensor] = {}

    def walk(self, steps: Sequence[Step], *, first: int = 0) -> Rows:
        """Runs all steps in order, then waits until everything sent has left.

        Args:
            steps: The steps.
            first: Position of the first of them, for whoever follows the rank.

        Returns:
            What modules that run ahead made for the next step.
        """
        self._expect(steps)
        for position, step in enumerate(steps, first):
            self._step(position, step)
        self._finish()
        return self._ahead

    def _expect(self, steps: Iterable[Step]) -> None:
        """Notes which transfers the steps wait for; the others are followed until they are done."""
        self._to_be_awaited = {step.transfer for step in steps if isinstance(step, Wait)}

    def _step(self, position: int, step: Step) -> None:
        """Runs the step at a position."""
        self._progress.begin(position, step)
        match step:
            case Post(transfer):
                self._post(transfer)
            case Wait(transfer):
                pending = self._awaited.pop(transfer)
                self._arrived[transfer] = pending.wait()
                self._under_way.append(pending)
            case Compute(task):
                self._compute(task)
        # What has left frees its buffers now, not at the end of the step.
        self._under_way = [each for each in self._under_way if not each.is_done()]
        self._progress.end(step)

    def _finish(self) -> None:
        """Waits until everything sent has left."""
        for pending in self._under_way:
            pending.finish()
        self._under_way = []

    def _post(self, transfer: Transfer) -> None:
        pending = self._open(transfer, self._leaving.pop(transfer, None))
        if transfer in self._to_be_awaited:
            self._awaited[transfer] = pending
        else:
            self._under_way.append(pending)

    def _open(self, transfer: Transfer, leaving: torch.Tensor | None) -> Pending:
        """Issues this rank's part of a transfer."""
        return self._channels[transfer.kind, transfer.edge].post(transfer.microbatch, leaving)

    def _compute(self, task: Task) -> None:
        if task.kind == "F":
            self._forward(task)
        else:
            self._backward(task)

    def _forward(self, task: Task) -> None:
        received = {
            edge.source: rows
            for edge in self._edges("activation", into=task)
            if (rows := self._take("activation", edge, task.microbatches)) is not None
        }
        leaving = self._runners[Stage(*task[1:3])].forward(task, received)
        for edge in self._edges("activation", out_of=task):
            self._hand_over("activation", edge, task, leaving)

    def _backward(self, task: Task) -> None:
        gradients = [
            rows
            for edge in self._edges("gradient", out_of=task)
            if (rows := self._take("gradient", edge, task.microbatches)) is not None
        ]
        # A module with several consumers receives one gradient from each.
        received = sum(gradients[1:], start=gradients[0]) if gradients else None
        leaving = self._runners[Stage(*task[1:3])].backward(task, received)
        for edge in self._edges("gradient", into=task):
            self._hand_over("gradient", edge, task, leaving.get(edge.source))

    def _edges(
        self, kind: TransferKind, *, into: Task | None = None, out_of: Task | None = None
    ) -> list[Edge]:
        end = into or out_of
        assert end is not None
        place = (end.module, end.stage)
        return [
            edge
            for channel_kind, edge in self._channels
            if channel_kind == kind
            and place
            == (
                (edge.destination, edge.destination_stage)
                if into
                else (edge.source, edge.source_stage)
            )
        ]

    def _take(
        self, kind: TransferKind, edge: Edge, microbatches: Sequence[int]
    ) -> torch.Tensor | None:
        parts = [self._arrived.pop(Transfer(kind, edge, m)) for m in microbatches]
        return self._channels[kind, edge].join(parts)

    def _hand_over(
        self, kind: TransferKind, edge: Edge, task: Task, leaving: torch.Tensor | None
    ) -> None:
        parts = self._channels[kind, edge].split(leaving, task.microbatches)
        keeper = self._ahead if crosses_steps(self._schedule.ahead, edge) else self._leaving
        for microbatch, part in zip(task.microbatches, parts, strict=True):
            keeper[Transfer(kind, edge, microbatch)] = part
