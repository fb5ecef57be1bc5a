"""A map-style data set, of which every module reads the samples of its own tasks."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from megatron_mosaic.host.data.facts import sample_facts
from megatron_mosaic.host.data.reader import Share
from megatron_mosaic.host.data.shares import Microbatches, StepShares
from megatron_mosaic.host.families.family import Batch, ModuleBoundary
from megatron_mosaic.layout.rows import Interval


class SampleSource:
    """Reads this rank's samples of one step after another.

    Args:
        dataset: Map-style data set.
        shares: What this rank reads.
        boundaries: Translators of the modules on this rank; they find rows.
        first_sample: Samples consumed before.
        num_workers: Loader processes of each module.
    """

    def __init__(
        self,
        dataset: Any,
        *,
        shares: StepShares,
        boundaries: Mapping[str, ModuleBoundary],
        first_sample: int,
        num_workers: int,
    ) -> None:
        self._dataset = dataset
        self._shares = shares
        self._boundaries = boundaries
        self._next_sample = first_sample
        self.state = None  # the samples consumed say it all
        self._loaders = {
            name: iter(self._loader(name, num_workers))
            for name in shares.tasks
            if self._intervals(name)
        }

    def read(self) -> Share:
        """Reads the next step.

        Raises:
            StopIteration: No whole step is left.
        """
        if self._next_sample + self._shares.num_samples > len(self._dataset):
            raise StopIteration
        self._next_sample += self._shares.num_samples
        batches: dict[str, dict[Microbatches, Batch | None]] = {}
        facts = []
        for name, tasks in self._shares.tasks.items():
            batches[name] = {}
            for task, samples in tasks.items():
                batch = next(self._loaders[name]) if samples.size else None
                batches[name][task] = batch
                if batch is not None:
                    facts.append((samples, sample_facts(batch, self._boundaries[name])))
        return Share(batches=batches, facts=facts)

    def _intervals(self, name: str) -> list[Interval]:
        return [samples for samples in self._shares.tasks[name].values() if samples.size]

    def _loader(self, name: str, num_workers: int) -> torch.utils.data.DataLoader:
        return torch.utils.data.DataLoader(
            self._dataset,
            batch_sampler=_Indices(
                self._intervals(name),
                first=self._next_sample,
                stride=self._shares.num_samples,
                stop=len(self._dataset),
            ),
            collate_fn=getattr(self._dataset, "collate_fn", None),
            num_workers=num_workers,
            pin_memory=dist.get_backend() == "nccl",
            persistent_workers=num_workers > 0,
        )


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
