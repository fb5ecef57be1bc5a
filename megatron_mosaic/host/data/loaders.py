"""Loaders that a script built for data-parallel ranks, such as Megatron Energon's.

Such a loader yields the microbatches of one language replica, whatever it reads for them. A rank
that needs samples of several replicas has a loader for each of them: loaders of equal shards give
equal samples, so nothing but the facts of samples has to travel. What it costs is that an encoder
rank reads the microbatches of every replica whose samples its tasks touch, and decodes them whole.
Where a plan deals its items by cost those are all replicas, and it drops the other ranks' images.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from megatron_mosaic.errors import HostError
from megatron_mosaic.host.data.batches import join_samples
from megatron_mosaic.host.data.facts import SampleFacts, sample_facts
from megatron_mosaic.host.data.items import StepOwners, items_of
from megatron_mosaic.host.data.reader import Share
from megatron_mosaic.host.data.shares import Microbatches, StepShares
from megatron_mosaic.host.families.family import Batch, ModuleBoundary
from megatron_mosaic.layout.rows import Interval


class LoaderSource:
    """Reads this rank's share of a step from the loaders of language replicas.

    Args:
        loaders: The loader of every replica that this rank reads.
        shares: What this rank reads.
        boundaries: Translators of the modules on this rank; they find rows.
        skipped: Microbatches of each replica that were trained before and are read past.
        saved_replica: Replica whose loader's state is kept for checkpoints, if any.
    """

    def __init__(
        self,
        loaders: Mapping[int, Any],
        *,
        shares: StepShares,
        boundaries: Mapping[str, ModuleBoundary],
        skipped: int = 0,
        saved_replica: int | None = None,
    ) -> None:
        self._loaders = loaders
        self._iterators: dict[int, Iterator[Batch]] | None = None
        self._shares = shares
        self._boundaries = boundaries
        self._skipped = skipped
        self._whole: Mapping[int, Batch] = {}
        self._cut: dict[str, dict[Microbatches, Batch | None]] = {}
        self.saved_replica = saved_replica
        self.state: Any = None

    def read(self) -> Share:
        """Reads the next step.

        Raises:
            StopIteration: A loader ended.
            HostError: A microbatch has another number of samples.
        """
        if self._iterators is None:
            self._iterators = self._start()
        if self.saved_replica is not None:
            # The step is read ahead: a checkpoint before it is trained must begin with it.
            self.state = _state_of(self._loaders[self.saved_replica])
        replicas = self._shares.language_replicas
        wanted = self._wanted()
        kept: dict[int, Batch] = {}
        facts = []
        for microbatch in range(self._shares.num_microbatches):
            for replica, iterator in self._iterators.items():
                number = microbatch * replicas + replica
                batch = next(iterator)
                found = self._facts(batch, replica)
                first = number * len(found)
                facts.append((Interval(first, first + len(found)), found))
                if number in wanted:
                    kept[number] = batch
        self._whole = kept
        batches = {
            name: {task: self._task_batch(samples, kept) for task, samples in tasks.items()}
            for name, tasks in self._shares.tasks.items()
            if name not in self._shares.dealt
        }
        return Share(batches=batches, facts=facts)

    def request(self, owners: StepOwners, facts: Sequence[SampleFacts]) -> None:
        """Cuts the items of the step that was read last out of its microbatches.

        Args:
            owners: To whom they are dealt.
            facts: Facts of every sample of the step.
        """
        self._cut = {
            name: {
                task: self._item_batch(items_of(owners[name][task], dp=dp), samples)
                for task, samples in self._shares.tasks[name].items()
            }
            for name, dp in self._shares.dealt.items()
        }
        self._whole = {}

    def pick_up(self) -> dict[str, dict[Microbatches, Batch | None]]:
        """Returns the items that were requested; None where there are none."""
        cut, self._cut = self._cut, {}
        return cut

    def _start(self) -> dict[int, Iterator[Batch]]:
        """Starts the loaders, and reads past what was trained before."""
        iterators = {
            # Megatron takes what a script returns as an iterator, if it is one.
            replica: loader if hasattr(loader, "__next__") else iter(loader)
            for replica, loader in self._loaders.items()
        }
        for iterator in iterators.values():
            for _ in range(self._skipped):
                next(iterator)
        return iterators

    def _wanted(self) -> set[int]:
        return {
            number
            for tasks in self._shares.tasks.values()
            for samples in tasks.values()
            if samples.size
            for number in self._shares.replica_microbatches(samples)
        }

    def _any_boundary(self) -> ModuleBoundary:
        """The translator of some module here: every module reads whole microbatches."""
        return next(iter(self._boundaries.values()))

    def _facts(self, batch: Batch, replica: int) -> list[SampleFacts]:
        found = sample_facts(batch, self._any_boundary())
        if len(found) != self._shares.samples_per_replica:
            raise HostError(
                f"data: samples={len(found)} of a microbatch for language replica {replica} must "
                f"equal micro_batch_size={self._shares.samples_per_replica}; let the loader "
                f"repeat its data or drop what is left over"
            )
        return found

    def _task_batch(self, samples: Interval, kept: Mapping[int, Batch]) -> Batch | None:
        """Puts the samples of a task together from the microbatches in which they lie."""
        if not samples.size:
            return None
        size = self._shares.samples_per_replica
        parts = []
        for number in self._shares.replica_microbatches(samples):
            batch = kept[number]
            first = number * size
            inside = Interval(samples.start - first, samples.stop - first).clip(Interval(0, size))
            parts.append(self._any_boundary().take_samples(batch, inside))
        return join_samples(parts)

    def _item_batch(self, items: Sequence[tuple[int, ...]], samples: Interval) -> Batch | None:
        """Puts the items of a task together that are dealt to this rank's replica.

        Args:
            items: Those of every sample of the task.
            samples: Samples of the task; none on ranks that are sent them.
        """
        if not samples.size or not any(items):
            return None
        size = self._shares.samples_per_replica
        parts = []
        for number in self._shares.replica_microbatches(samples):
            first = number * size - samples.start
            own = items[first : first + size]
            if any(own):
                parts.append(self._any_boundary().take_items(self._whole[number], own))
        return join_samples(parts)


def _state_of(loader: Any) -> Any:
    if not hasattr(loader, "save_state"):
        raise HostError(
            f"data: loader={type(loader).__name__} must have save_state() with --dataloader-save; "
            f"give it one, or remove the option: a resumed run then reads past what was trained"
        )
    return loader.save_state()
