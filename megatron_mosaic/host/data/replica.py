"""Lets a script build the loader of one language replica, on whatever rank.

A script shards its data by the data-parallel rank and size that ``parallel_state`` tells, and
skips ranks that are not the first of their tensor-parallel group or are on a middle stage.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch.distributed import distributed_c10d

from megatron_mosaic.host.parallel_state_scope import ParallelStateScope

_DATA_PARALLEL_FIELDS = ("dp", "dp_cp", "intra_dp_cp")


@contextmanager
def as_replica(replica: int, *, num_replicas: int, lone: ProcessGroupCollection) -> Iterator[None]:
    """Makes this process look like the only rank of a language replica.

    Args:
        replica: Data-parallel rank of the replica.
        num_replicas: Replicas of the language model.
        lone: Groups of this rank alone, for all else.

    Note:
        The data-parallel group can be asked for its rank and size and for nothing more: several
        ranks may be the same replica here, so it communicates with no one.
    """
    # A group of no backend: torch documents another constructor alone.
    group = dist.ProcessGroup(replica, num_replicas)  # pyright: ignore[reportCallIssue]
    # torch.distributed.get_rank(group) looks into torch's own table of groups.
    ranks_of = distributed_c10d._world.pg_group_ranks
    ranks_of[group] = {dist.get_rank(): replica}
    collection = copy.copy(lone)
    for field in _DATA_PARALLEL_FIELDS:
        setattr(collection, field, group)
    try:
        with ParallelStateScope(collection).active():
            yield
    finally:
        del ranks_of[group]
