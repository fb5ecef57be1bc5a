"""A map-style data set, of which every module reads the samples of its own tasks."""

import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import torch
import torch.distributed as dist

from megatron_mosaic.host.data.facts import SampleFacts, check_texts, sample_facts
from megatron_mosaic.host.data.items import StepOwners, items_of
from megatron_mosaic.host.data.reader import Share
from megatron_mosaic.host.data.shares import Microbatches, StepShares
from megatron_mosaic.host.data.unreadable import Allowance, NamedBatches, NamedSamples
from megatron_mosaic.host.families.family import Batch, ModuleBoundary
from megatron_mosaic.layout.rows import Interval

# A sample, and which of its items are wanted.
_Request = tuple[int, tuple[int, ...]]


class ReadsItems(Protocol):
    """A data set that can decode some items of a sample and leave the others alone."""

    def read_items(self, index: int, items: Sequence[int]) -> Any:
        """Returns a sample as ``__getitem__`` does, with only some of its items.

        Args:
            index: The sample.
            items: Numbers of the images that are wanted, counted in the sample, ascending.
        """
        ...


def reads_items(dataset: Any) -> bool:
    """Whether a data set is one that :class:`ReadsItems` describes."""
    return hasattr(dataset, "read_items")


class SampleSource:
    """Reads this rank's samples of one step after another.

    Args:
        dataset: Map-style data set.
        shares: What this rank reads.
        boundaries: Translators of the modules on this rank; they find rows.
        first_sample: Samples consumed before.
        num_workers: Loader processes of each module.
        allowance: How many samples may be passed over that cannot be read.
        ignores_signal: Signal that ends no loader process; the rank ends it when it ends.
    """

    def __init__(
        self,
        dataset: Any,
        *,
        shares: StepShares,
        boundaries: Mapping[str, ModuleBoundary],
        first_sample: int,
        num_workers: int,
        allowance: Allowance,
        ignores_signal: int | None = None,
    ) -> None:
        self._dataset = dataset
        self._allowance = allowance
        self._ignores_signal = ignores_signal
        self._shares = shares
        self._boundaries = boundaries
        self._next_sample = first_sample
        self.state = None  # the samples consumed say it all
        self._loaders = {
            name: iter(self._loader(name, num_workers))
            for name in shares.tasks
            if name not in shares.dealt and self._intervals(name)
        }
        self._items = {
            name: ItemReader(
                dataset,
                boundary=boundaries[name],
                num_workers=num_workers,
                allowance=allowance,
                ignores_signal=ignores_signal,
            )
            for name in shares.dealt
            if self._intervals(name)
        }

    def read(self) -> Share:
        """Reads the next step, without the items that are dealt.

        Raises:
            StopIteration: No whole step is left.
        """
        if self._next_sample + self._shares.num_samples > len(self._dataset):
            raise StopIteration
        self._next_sample += self._shares.num_samples
        batches: dict[str, dict[Microbatches, Batch | None]] = {}
        facts = []
        for name, tasks in self._shares.tasks.items():
            if name in self._shares.dealt:
                continue
            batches[name] = {}
            for task, samples in tasks.items():
                reads = samples.size > 0
                batch = self._allowance.take(next(self._loaders[name])) if reads else None
                batches[name][task] = batch
                if batch is not None:
                    facts.append((samples, sample_facts(batch, self._boundaries[name])))
        return Share(batches=batches, facts=facts)

    def request(self, owners: StepOwners, facts: Sequence[SampleFacts]) -> None:
        """Begins to read the items of the step that was read last.

        Args:
            owners: To whom they are dealt.
            facts: Facts of every sample of the step.
        """
        first = self._next_sample - self._shares.num_samples
        for name, reader in self._items.items():
            wanted = {
                task: items_of(owners[name][task], dp=self._shares.dealt[name])
                for task in self._shares.tasks[name]
            }
            reader.request(wanted, facts, first=first, size=self._shares.microbatch_size)

    def pick_up(self) -> dict[str, dict[Microbatches, Batch | None]]:
        """Returns what was requested; None where there is no item.

        Raises:
            HostError: A sample is another one than its facts say, or has other items.
        """
        return {
            name: self._items[name].pick_up()
            if name in self._items
            else dict.fromkeys(self._shares.tasks[name])
            for name in self._shares.dealt
        }

    def _intervals(self, name: str) -> list[Interval]:
        return [samples for samples in self._shares.tasks[name].values() if samples.size]

    def _loader(self, name: str, num_workers: int) -> torch.utils.data.DataLoader:
        return _loader(
            self._dataset,
            self._dataset.__getitem__,
            batch_sampler=_Indices(
                self._intervals(name),
                first=self._next_sample,
                stride=self._shares.num_samples,
                stop=len(self._dataset),
            ),
            num_workers=num_workers,
            allowance=self._allowance,
            ignores_signal=self._ignores_signal,
        )


class ItemReader:
    """Reads the items of one module's tasks that are dealt to this rank's replica.

    Its loader runs once through the batches of each step: what they hold is known a step before.
    Of samples that the data set only reads whole the other items are dropped.

    Args:
        dataset: Map-style data set.
        boundary: The module's translator.
        num_workers: Loader processes.
        allowance: How many samples may be passed over that cannot be read.
        ignores_signal: Signal that ends no loader process.
    """

    def __init__(
        self,
        dataset: Any,
        *,
        boundary: ModuleBoundary,
        num_workers: int,
        allowance: Allowance,
        ignores_signal: int | None = None,
    ) -> None:
        self._boundary, self._allowance = boundary, allowance
        self._several = boundary.item_cost().item_rows is not None
        self._by_item = self._several and reads_items(dataset)
        self._lists: list[list[Any]] = []
        # A loader draws a seed for every run through it. From a generator of its own: the
        # process's has to stand where it stands with samples in order.
        seeds = torch.Generator().manual_seed(torch.initial_seed())
        self._loader = _loader(
            dataset,
            _ItemsOfSamples(dataset).read if self._by_item else dataset.__getitem__,
            batch_sampler=self._lists,
            num_workers=num_workers,
            allowance=allowance,
            ignores_signal=ignores_signal,
            generator=seeds,
        )
        self._iterator: Iterator[Any] = iter(())
        self._requests: dict[Microbatches, list[_Request]] = {}
        self._checksums: dict[Microbatches, list[int]] = {}

    def request(
        self,
        wanted: Mapping[Microbatches, Sequence[tuple[int, ...]]],
        facts: Sequence[SampleFacts],
        *,
        first: int,
        size: int,
    ) -> None:
        """Begins to read the items of a step.

        Args:
            wanted: Items of every sample of each task.
            facts: Facts of every sample of the step.
            first: First sample of the step.
            size: Samples of a global microbatch.
        """
        self._requests, self._checksums = {}, {}
        for task, samples in wanted.items():
            numbered = enumerate(samples, start=task[0] * size)
            own = [(sample, items) for sample, items in numbered if items]
            self._requests[task] = [(first + sample, items) for sample, items in own]
            self._checksums[task] = [facts[sample].text_checksum for sample, _ in own]
        self._lists[:] = [
            requests if self._by_item else [index for index, _ in requests]
            for requests in self._requests.values()
            if requests
        ]
        self._iterator = iter(self._loader)

    def pick_up(self) -> dict[Microbatches, Batch | None]:
        """Returns the batch of every task; None where the replica has no item."""
        return {task: self._batch(task) for task in self._requests}

    def _batch(self, task: Microbatches) -> Batch | None:
        if not self._requests[task]:
            return None
        batch = self._allowance.take(next(self._iterator))
        check_texts(batch, self._checksums[task])
        items = [items for _, items in self._requests[task]]
        return self._boundary.take_items(batch, items)


def _loader(
    dataset: Any,
    read: Callable[[Any], Any],
    *,
    batch_sampler: Any,
    num_workers: int,
    allowance: Allowance,
    ignores_signal: int | None,
    generator: torch.Generator | None = None,
) -> torch.utils.data.DataLoader:
    """Loads batches, each with what could not be read for it."""
    return torch.utils.data.DataLoader(
        NamedSamples(read, length=len(dataset), tries=allowance.tries),
        batch_sampler=batch_sampler,
        collate_fn=NamedBatches(getattr(dataset, "collate_fn", None)),
        num_workers=num_workers,
        pin_memory=dist.get_backend() == "nccl",
        persistent_workers=num_workers > 0,
        worker_init_fn=partial(_prepare_worker, ignores_signal=ignores_signal),
        generator=generator,
    )


def _prepare_worker(worker: int, *, ignores_signal: int | None) -> None:
    """Lets a run that saves when it is told to end read on until then."""
    if ignores_signal is not None:
        signal.signal(ignores_signal, signal.SIG_IGN)


class _ItemsOfSamples:
    """Some items of each sample, as a request names them."""

    def __init__(self, dataset: ReadsItems) -> None:
        self._dataset = dataset

    def read(self, request: _Request) -> Any:
        """Reads the items of a sample."""
        index, items = request
        return self._dataset.read_items(index, items)


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
