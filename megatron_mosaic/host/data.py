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
from megatron_mosaic.layout.ownership import Runs, count_rows, encoder_samples, language_samples
from megatron_mosaic.layout.placement import LANGUAGE, ModulePlacement
from megatron_mosaic.layout.rows import Interval
from megatron_mosaic.schedule.schedule import Schedule

Microbatches = tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class StepBatches:
    """What one rank needs of one step's data.

    Args:
        batches: Batch of every forward task, by module; None where nothing is read.
        rows: Where the boundary rows of every sample of the step belong, by the module that makes
            them, on all ranks alike.
    """

    batches: Mapping[str, Mapping[Microbatches, Batch | None]]
    rows: Mapping[str, tuple[Runs, ...]]


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
        boundaries: Translators of the modules on this rank; they find rows.
        positions: Whether some module needs to know where rows belong, not only how many.
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
        positions: bool,
        samples_per_replica: int,
        first_sample: int,
        num_workers: int,
        host_group: dist.ProcessGroup,
    ) -> None:
        self._dataset = dataset
        self._hosted = hosted
        self._sources = list(sources)
        self._boundaries = boundaries
        self._positions = positions
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
        rows = self._exchange_rows(batches)
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

    def _exchange_rows(
        self, batches: Mapping[str, Mapping[Microbatches, Batch | None]]
    ) -> Mapping[str, tuple[Runs, ...]]:
        """Tells every rank the rows of every sample; errors become errors of all ranks."""
        own, failure = _KnownRows(self._sources, num_samples=self._step_samples), None
        try:
            for name, tasks in batches.items():
                for task, batch in tasks.items():
                    if batch is not None:
                        samples = self._samples(name, task)
                        own.add(name, samples, self._boundaries[name].row_runs(batch))
        except HostError as error:
            failure = error
        raise_together(failure, group=self._host_group)
        dist.all_reduce(own.counts, op=dist.ReduceOp.MAX, group=self._host_group)
        own.check(first_sample=self._next_sample)
        if not self._positions:
            return own.counted()
        runs = own.packed()
        dist.all_reduce(runs, op=dist.ReduceOp.MAX, group=self._host_group)
        return own.unpacked(runs)


class _KnownRows:
    """What this rank knows of the rows of a step's samples, as tensors to be merged by maximum.

    Args:
        sources: Modules that make rows.
        num_samples: Samples of a step.
    """

    def __init__(self, sources: Sequence[str], *, num_samples: int) -> None:
        self._sources = sources
        self._runs: list[list[Runs]] = [[()] * num_samples for _ in sources]
        # Rows that the source counts, rows that the modules it feeds count, and runs of rows.
        self.counts = torch.full((3, len(sources), num_samples), -1, dtype=torch.int64)

    def add(self, reader: str, samples: Interval, found: Mapping[str, Sequence[Runs]]) -> None:
        """Notes what a module found in the samples that it read."""
        for source, runs in found.items():
            index = self._sources.index(source)
            self._runs[index][samples.start : samples.stop] = runs
            own = self.counts[:, index, samples.start : samples.stop]
            own[0 if source == reader else 1] = torch.tensor([count_rows(each) for each in runs])
            own[2] = torch.tensor([len(each) for each in runs])

    def check(self, *, first_sample: int) -> None:
        """Checks that source and destination see the same rows.

        Raises:
            LayoutError: They do not; alike on all ranks, which have the same merged counts.
        """
        differing = (self.counts[0] != self.counts[1]).nonzero().tolist()
        if differing:
            index, sample = differing[0]
            made, read = self.counts[:2, index, sample].tolist()
            raise LayoutError(
                f"data: rows={made} that {self._sources[index]} makes of sample "
                f"{first_sample + sample} must equal the {read} that the module it feeds reads; "
                f"make the data set return the same sample for the same index"
            )

    def counted(self) -> dict[str, tuple[Runs, ...]]:
        """Returns how many rows every sample has, wherever they belong."""
        return {
            source: tuple((Interval(0, count),) for count in counts)
            for source, counts in zip(self._sources, self.counts[0].tolist(), strict=True)
        }

    def packed(self) -> torch.Tensor:
        """Returns the runs of samples that this rank knows, ``[sources, samples, runs, 2]``."""
        longest = max(int(self.counts[2].max()), 1)
        packed = torch.full((*self.counts.shape[1:], longest, 2), -1, dtype=torch.int64)
        for index, samples in enumerate(self._runs):
            for sample, runs in enumerate(samples):
                if runs:
                    packed[index, sample, : len(runs)] = torch.tensor(runs)
        return packed

    def unpacked(self, packed: torch.Tensor) -> dict[str, tuple[Runs, ...]]:
        """Reads the merged tensor."""
        return {
            source: tuple(tuple(Interval(*run) for run in runs if run[0] >= 0) for runs in samples)
            for source, samples in zip(self._sources, packed.tolist(), strict=True)
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
