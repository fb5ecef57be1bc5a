"""Runs a training script on this rank and records losses, gradients, weights and what was done."""

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch

from megatron_mosaic.comm.replay import Entry
from megatron_mosaic.rehearsal.shards import Shard, gradient, hosted_shards, model_shards, weight
from megatron_mosaic.schedule.steps import Step

Groups = Mapping[str, Mapping[str, tuple[int, ...]]]
"""Global ranks of process groups, by module and Megatron's name of the group."""


class Walked(NamedTuple):
    """What a rank did in one step, in order."""

    forward_only: bool
    steps: list[Step]


@dataclass
class Record:
    """What one rank saw.

    Args:
        losses: Of every training step, what is reported by name.
        evaluations: Of every step of evaluation.
        gradients: Before every optimizer step.
        weights: Before every optimizer step, and after the last.
        walked: Steps of the schedule that ran, of every training and evaluation step.
        groups: Those of every module on the rank.
        communication: What the rank issued and waited for.
    """

    losses: list[dict[str, list[float]]] = field(default_factory=list)
    evaluations: list[dict[str, list[float]]] = field(default_factory=list)
    gradients: list[dict[str, Shard]] = field(default_factory=list)
    weights: list[dict[str, Shard]] = field(default_factory=list)
    walked: list[Walked] = field(default_factory=list)
    groups: Groups = field(default_factory=dict)
    communication: list[Entry] = field(default_factory=list)


def record_plan(
    script: str,
    arguments: Sequence[str],
    *,
    on_cpu: bool = True,
    lane: Callable[[], str] = lambda: "",
    before: Callable[[], None] = lambda: None,
    with_groups: Callable[[Groups], None] = lambda groups: None,
    after_step: Callable[[int], None] = lambda step: None,
) -> Record:
    """Trains under a plan. Called on every rank.

    Args:
        script: Module with ``main(parse_and_validate_args, pretrain)``.
        arguments: Of the script.
        on_cpu: Whether Megatron runs without its GPU.
        lane: Tells in which lane the rank launches.
        before: Runs once everything is imported.
        with_groups: Is told the groups before anything runs on them.
        after_step: Is told the number of training steps that have run.
    """
    from megatron_mosaic.host.cpu import run_on_cpu

    if on_cpu:
        run_on_cpu()
    from megatron_mosaic.comm.record import record as recording
    from megatron_mosaic.host import training
    from megatron_mosaic.host.arguments import parse_and_validate_args

    record, runtimes = Record(), []
    original = training.PlanForwardBackward
    training.PlanForwardBackward = _recording(record, runtimes, with_groups, after_step)
    try:
        before()
        sys.argv = ["script", *arguments]
        with recording(lane) as log:
            # Imported now that Megatron is ready for the CPU.
            importlib.import_module(script).main(parse_and_validate_args, training.pretrain)
    finally:
        training.PlanForwardBackward = original
    (runtime,) = runtimes
    record.weights.append(dict(hosted_shards(runtime, weight)))
    record.communication = log
    return record


def _recording(
    record: Record,
    runtimes: list[Any],
    with_groups: Callable[[Groups], None],
    after_step: Callable[[int], None],
) -> type:
    """Makes a class that does what ``PlanForwardBackward`` does, and records it."""
    from megatron_mosaic.host.forward_backward import PlanForwardBackward

    class RecordingForwardBackward(PlanForwardBackward):
        def __init__(self, runtime: Any, **options: Any) -> None:
            super().__init__(runtime, **options)
            runtimes.append(runtime)
            record.groups = _groups_of(runtime)
            with_groups(record.groups)
            self._begin_step_of_schedule = self._progress.begin
            self._progress.begin = self._note_step

        def _note_step(self, position: int, step: Step) -> None:
            record.walked[-1].steps.append(step)
            self._begin_step_of_schedule(position, step)

        def __call__(self, *, forward_only: bool = False, **arguments: Any) -> list[dict]:
            record.walked.append(Walked(forward_only, []))
            losses = super().__call__(forward_only=forward_only, **arguments)
            (record.evaluations if forward_only else record.losses).append(_numbers(losses))
            if not forward_only:
                record.losses[-1] |= _auxiliary_losses(arguments["num_microbatches"])
                record.gradients.append(dict(hosted_shards(self._runtime, gradient)))
                record.weights.append(dict(hosted_shards(self._runtime, weight)))
                after_step(len(record.losses))
            return losses

    return RecordingForwardBackward


def _groups_of(runtime: Any) -> Groups:
    import torch.distributed as dist

    return {
        name: {
            field: tuple(dist.get_process_group_ranks(group))
            for field, group in vars(groups.collection).items()
            if isinstance(group, dist.ProcessGroup)
        }
        for name, groups in runtime.hosted.items()
    }


def record_stock(script: str, arguments: Sequence[str], *, by_name: bool = True) -> Record:
    """Trains under stock Megatron in one process.

    Args:
        script: Module with ``main(parse_and_validate_args, pretrain, provider)`` and its functions.
        arguments: Of the script.
        by_name: Whether initial weights follow from names, as under a plan.
    """
    from megatron_mosaic.host.cpu import run_on_cpu

    run_on_cpu()
    from megatron.training import pretrain, training
    from megatron.training.arguments import parse_and_validate_args

    record = Record()
    models = []
    stock_func = training.get_forward_backward_func

    def recording_func(*unused: Any, **also_unused: Any) -> Any:
        forward_backward = stock_func()

        def run(*, forward_only: bool, model: Any, **arguments: Any) -> list[dict]:
            losses = forward_backward(forward_only=forward_only, model=model, **arguments)
            total = _totals(losses)
            (record.evaluations if forward_only else record.losses).append(total)
            if not forward_only:
                record.losses[-1] |= _auxiliary_losses(arguments["num_microbatches"])
                record.gradients.append(dict(model_shards(model[0], gradient)))
                record.weights.append(dict(model_shards(model[0], weight)))
                models[:] = model
            return losses

        return run

    training.get_forward_backward_func = recording_func
    functions: Any = importlib.import_module(script)
    functions.train_valid_test_datasets_provider = _one_reader(
        functions.train_valid_test_datasets_provider
    )
    sys.argv = ["script", *arguments, "--dataloader-type", "external"]
    provider = functions.model_provider
    if by_name:
        provider = initialized_by_name(provider)
    functions.main(parse_and_validate_args, pretrain, provider)
    record.weights.append(dict(model_shards(models[0], weight)))
    return record


def initialized_by_name(provider: Any) -> Any:
    """Returns a model provider whose models have initial weights by name."""
    return partial(_provide_by_name, provider)


def _provide_by_name(provider: Any, *arguments: Any, **options: Any) -> torch.nn.Module:
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training import get_args

    from megatron_mosaic.host.groups import ModuleGroups
    from megatron_mosaic.host.weights import initialize_by_name
    from megatron_mosaic.layout.placement import ModulePlacement

    model = provider(*arguments, **options)
    placement = ModulePlacement(name="language", ranks=(0,))
    groups = ModuleGroups(
        placement=placement,
        position=placement.coordinates(0),
        expert_position=placement.expert_coordinates(0),
        collection=ProcessGroupCollection(),
    )
    initialize_by_name(model, seed=get_args().seed, groups=groups)
    return model


def _one_reader(provider: Any) -> Any:
    """Reads the same microbatches in order: torch's loader cannot stack ragged images."""

    def iterators(num_samples: list[int]) -> tuple:
        from megatron.training import get_args

        size = get_args().micro_batch_size
        # Megatron leaves it to an external loader to go on where a checkpoint stopped.
        starts = (get_args().consumed_train_samples, 0, 0)
        return tuple(
            read(data, size, start)
            for data, start in zip(provider(num_samples), starts, strict=True)
        )

    def read(data: Any, size: int, start: int) -> Any:
        if data is None or isinstance(data, torch.utils.data.IterableDataset):
            return data and iter(data)  # it yields whole microbatches
        rest = torch.utils.data.Subset(data, range(start, len(data)))
        return iter(torch.utils.data.DataLoader(rest, size, collate_fn=data.collate_fn))

    iterators.is_distributed = True
    return iterators


def _numbers(losses: list[dict]) -> dict[str, list[float]]:
    return {key: value.double().tolist() for key, value in losses[0].items()} if losses else {}


def _auxiliary_losses(num_microbatches: int) -> dict[str, list[float]]:
    """Returns what routers recorded for each layer in this step, as the stock loop scales it."""
    from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker

    metrics = get_moe_metrics_tracker().metrics
    return {
        name: (entry.values.double() / num_microbatches).tolist() for name, entry in metrics.items()
    }


def _totals(losses: list[dict]) -> dict[str, list[float]]:
    """Sums (loss, tokens) pairs over microbatches; averages single values."""
    totals = {}
    for key in losses[0]:
        values = torch.stack([entry[key].double().reshape(-1) for entry in losses])
        totals[key] = (values.sum(0) if values.shape[1] == 2 else values.mean(0)).tolist()
    return totals
