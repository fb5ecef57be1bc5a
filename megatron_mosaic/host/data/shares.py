"""Which samples of a step each module on this rank reads, and for which task."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch.distributed as dist

from megatron_mosaic.host.groups import ModuleGroups
from megatron_mosaic.layout.ownership import encoder_samples, language_samples
from megatron_mosaic.layout.placement import LANGUAGE, ModulePlacement
from megatron_mosaic.layout.rows import Interval
from megatron_mosaic.schedule.schedule import Schedule

Microbatches = tuple[int, ...]


def deals_items(placement: ModulePlacement) -> bool:
    """Whether the items of a module's tasks go to its replicas by their cost."""
    return placement.items == "balanced"


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
        Samples counted from the beginning of the step; all of the task where its items are dealt
        by cost, for which of them are this rank's is known a step later.
    """
    if deals_items(placement):
        return Interval(task[0] * size, (task[0] + len(task)) * size)
    if placement.name == LANGUAGE:
        shares = language_samples(
            samples_per_replica, data_parallel_size=placement.data_parallel_size
        )
    else:
        shares = encoder_samples(len(task) * size, data_parallel_size=placement.data_parallel_size)
    first = task[0] * size
    return Interval(first + shares[dp].start, first + shares[dp].stop)


@dataclass(frozen=True, kw_only=True, slots=True)
class StepShares:
    """This rank's share of every step.

    Args:
        tasks: Forward tasks of each module on this rank, in order, and the samples that this rank
            reads for them, counted from the beginning of the step. No samples: the rank is sent
            them by its tensor-parallel rank 0, or has none.
        dealt: Modules of which a rank reads some items of these samples, those that are dealt to
            its replica, whose number stands here.
        samples_per_replica: Samples of a microbatch of one language replica.
        language_replicas: Data-parallel size of the language model.
        num_microbatches: Global microbatches of a step.
    """

    tasks: Mapping[str, Mapping[Microbatches, Interval]]
    samples_per_replica: int
    language_replicas: int
    num_microbatches: int
    dealt: Mapping[str, int] = field(default_factory=dict)

    @property
    def microbatch_size(self) -> int:
        """Samples of a global microbatch."""
        return self.samples_per_replica * self.language_replicas

    @property
    def num_samples(self) -> int:
        """Samples of a step."""
        return self.microbatch_size * self.num_microbatches

    def replica_microbatches(self, samples: Interval) -> range:
        """Microbatches of language replicas that samples lie in.

        Returns:
            Their numbers: the m-th of replica r is ``m * language_replicas + r``.
        """
        return range(
            samples.start // self.samples_per_replica, -(-samples.stop // self.samples_per_replica)
        )

    def replicas_read(self) -> list[int]:
        """Language replicas any of whose samples this rank reads."""
        return sorted(
            {
                number % self.language_replicas
                for tasks in self.tasks.values()
                for samples in tasks.values()
                if samples.size
                for number in self.replica_microbatches(samples)
            }
        )


def step_shares(
    schedule: Schedule,
    hosted: Mapping[str, ModuleGroups],
    *,
    language: ModulePlacement,
    samples_per_replica: int,
) -> StepShares:
    """Finds this rank's share of a step.

    Only tensor-parallel rank 0 of a replica reads, as in a stock run: the script's own
    ``get_batch`` sends the data on.

    Args:
        schedule: Order of the tasks of a step; equal on all ranks.
        hosted: Modules on this rank.
        language: The language model, whose replicas give the microbatches their size.
        samples_per_replica: Samples of a microbatch of one language replica.
    """
    size = samples_per_replica * language.data_parallel_size

    def samples(groups: ModuleGroups, task: Microbatches) -> Interval:
        if groups.position.tp != 0:
            return Interval(0, 0)
        return task_samples(
            groups.placement,
            task,
            dp=groups.position.dp,
            samples_per_replica=samples_per_replica,
            size=size,
        )

    own = [task for task in schedule.tasks[dist.get_rank()] if task.kind == "F"]
    return StepShares(
        tasks={
            name: {
                task.microbatches: samples(groups, task.microbatches)
                for task in own
                if task.module == name
            }
            for name, groups in hosted.items()
        },
        samples_per_replica=samples_per_replica,
        language_replicas=language.data_parallel_size,
        num_microbatches=schedule.num_microbatches,
        dealt={
            name: groups.position.dp
            for name, groups in hosted.items()
            if deals_items(groups.placement)
        },
    )
