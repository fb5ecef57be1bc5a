"""Reads, for each module, its own samples of the same global microbatches."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_mosaic.errors import HostError, LayoutError
from megatron_mosaic.host.agreement import raise_together
from megatron_mosaic.host.families.family import Batch, ModuleBoundary
from megatron_mosaic.host.groups import ModuleGroups
from megatron_mosaic.layout.ownership import Interval, encoder_samples, language_samples
from megatron_mosaic.layout.placement import LANGUAGE, ModulePlacement
from megatron_mosaic.schedule.schedule import Schedule

Microbatches = tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class StepBatches:
    """What one rank needs of one step's data.

    Args:
        batches: Batch of every forward task, by module; None where nothing is read.
        rows: Boundary rows of every sample of the step by the module that makes them, on all
            ranks alike.
    """

    batches: Mapping[str, Mapping[Microbatches, Batch | None]]
    rows: Mapping[str, tuple[int, ...]]


def task_samples(
    placement: ModulePlacement, task: Microbatches, *, dp: int, samples_per_replica: int, size: int
) -> Interval:
    """Samples that one data-parallel rank of a module reads for a task.

    Args:
        placement: The module.
        task: Consecutive microbatches of the task.
        dp: Data-parallel rank within the module.
        samples_per_replica: ``micro_batch_size``.
        size: Samples of one global microbatch.

    Returns:
        Samples counted from the beginning of the step.
    """
    if placement.name == LANGUAGE:
        shares = language_samples(
            samples_per_replica, data_parallel_size=placement.data_parallel_size
        )
    else:
        shares = encoder_samples(len(task) * size, data_parallel_size=placement.data_parallel_size)
    first = task[0] * size
    return Interval(first + shares[dp].start, first + shares[dp].stop)


class StepReader:
    """Iterates over steps; hands every forward task of this rank the batch it reads.

    Only tensor-parallel rank 0 of a replica reads, as in a stock run: the script's own
    ``get_batch`` sends the data on. Row counts of all samples are exchanged on the host, for
    nobody reads every sample.

    Args:
        dataset: Map-style data set, or None where this rank reads nothing.
        schedule: Order of the tasks of a step; equal on all ranks.
        hosted: Modules on this rank.
        sources: Modules that make boundary rows, on all ranks alike.
        boundaries: Translators of the modules on this rank; they count rows.
        samples_per_replica: Samples of a microbatch of one language replica.
        first_sample: Samples consumed before.
        num_workers: Loader processes.
        host_group: Group of the whole world that works on host memory.

    Note:
        Iterating is collective over the world.
    """

    def __init__(
        self,
        dataset: Any,
        *,
        schedule: Schedule,
        hosted: Mapping[str, ModuleGroups],
        language: ModulePlacement,
        sources: Sequence[str],
        boundaries: Mapping[str, ModuleBoundary],
        samples_per_replica: int,
        first_sample: int,
        num_workers: int,
        host_group: dist.ProcessGroup,
    ) -> None:
        self._dataset = dataset
        self._hosted = hosted
        self._sources = list(sources)
        self._boundaries = boundaries
        self._host_group = host_group
        self._mbs = samples_per_replica
        self._size = samples_per_replica * language.data_parallel_size
        self._step_samples = self._size * schedule.num_microbatches
        self._next_sample = first_sample
        rank = dist.get_rank()
        self._tasks = {
            name: [
                task.microbatches
                for task in schedule.tasks[rank]
                if task.kind == "F" and task.module == name
            ]
            for name in hosted
        }
        self._loaders = {
            name: iter(self._loader(name, num_workers))
            for name, groups in hosted.items()
            if groups.position.tp == 0
        }

    def __iter__(self) -> Iterator[StepBatches]:
        return self

    def __next__(self) -> StepBatches:
        if self._next_sample + self._step_samples > len(self._dataset):
            raise StopIteration
        batches = {
            name: {task: self._read(name, task) for task in tasks}
            for name, tasks in self._tasks.items()
        }
        rows = self._exchange_counts(batches)
        self._next_sample += self._step_samples
        return StepBatches(batches=batches, rows=rows)

    def _samples(self, name: str, task: Microbatches) -> Interval:
        groups = self._hosted[name]
        return task_samples(
            groups.placement,
            task,
            dp=groups.position.dp,
            samples_per_replica=self._mbs,
            size=self._size,
        )

    def _loader(self, name: str, num_workers: int) -> torch.utils.data.DataLoader:
        return torch.utils.data.DataLoader(
            self._dataset,
            batch_sampler=_Indices(
                [
                    samples
                    for task in self._tasks[name]
                    if (samples := self._samples(name, task)).size
                ],
                first=self._next_sample,
                stride=self._step_samples,
                stop=len(self._dataset),
            ),
            collate_fn=getattr(self._dataset, "collate_fn", None),
            num_workers=num_workers,
            pin_memory=dist.get_backend() == "nccl",
            persistent_workers=num_workers > 0,
        )

    def _read(self, name: str, task: Microbatches) -> Batch | None:
        if name not in self._loaders or not self._samples(name, task).size:
            return None
        return next(self._loaders[name])

    def _exchange_counts(
        self, batches: Mapping[str, Mapping[Microbatches, Batch | None]]
    ) -> Mapping[str, tuple[int, ...]]:
        """Tells every rank the rows of every sample; errors become errors of all ranks."""
        # What the module that makes the rows counts, and what the modules that it feeds do.
        counts = torch.full((2, len(self._sources), self._step_samples), -1, dtype=torch.int64)
        failure = None
        try:
            for name, tasks in batches.items():
                for task, batch in tasks.items():
                    if batch is None:
                        continue
                    start, stop = self._samples(name, task)
                    for source, own in self._boundaries[name].row_counts(batch).items():
                        side = 0 if source == name else 1
                        counts[side, self._sources.index(source), start:stop] = torch.tensor(own)
        except HostError as error:
            failure = error
        raise_together(failure, group=self._host_group)
        dist.all_reduce(counts, op=dist.ReduceOp.MAX, group=self._host_group)
        return {
            source: _agreed(source, counts[:, index], self._next_sample)
            for index, source in enumerate(self._sources)
        }


class _Indices:
    """Index lists of one module's tasks, step after step."""

    def __init__(
        self, intervals: Sequence[Interval], *, first: int, stride: int, stop: int
    ) -> None:
        self._intervals = intervals
        self._first, self._stride, self._stop = first, stride, stop

    def __iter__(self) -> Iterator[list[int]]:
        first = self._first
        while first + self._stride <= self._stop:
            for interval in self._intervals:
                yield list(range(first + interval.start, first + interval.stop))
            first += self._stride


def _agreed(source: str, counts: torch.Tensor, first_sample: int) -> tuple[int, ...]:
    differing = (counts[0] != counts[1]).nonzero().flatten().tolist()
    if differing:
        sample = differing[0]
        raise LayoutError(
            f"data: rows={counts[0, sample].item()} that {source} makes of sample "
            f"{first_sample + sample} must equal the {counts[1, sample].item()} that the module it "
            f"feeds reads; make the data set return the same sample for the same index"
        )
    return tuple(counts[0].tolist())
