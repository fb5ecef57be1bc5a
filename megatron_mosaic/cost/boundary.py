"""Time of the transfer that changes the layout of a boundary tensor."""

from megatron_mosaic.cluster.spec import Cluster
from megatron_mosaic.cost.collectives import Group, all_gather_s, send_s
from megatron_mosaic.cost.sizes import ParallelSizes


def boundary_s(
    total_bytes: float, *, source: ParallelSizes, destination: ParallelSizes, cluster: Cluster
) -> float:
    """Time until every rank has the rows that it keeps; gradients go back in as much.

    All ranks of the source's last stage send at once, each its own part, to those of the
    destination's first stage; with sequence or context parallelism each of these keeps a part.
    Otherwise each tensor-parallel rank receives its part of the rows, and they gather the rest.

    Args:
        total_bytes: Of the rows of all replicas.
        source: Sizes of the module that makes the rows.
        destination: Sizes of the one that takes them.
        cluster: What both run on.
    """
    if total_bytes <= 0:
        return 0.0
    senders = source.tp * source.cp * source.dp
    receivers = destination.tp * destination.cp * destination.dp
    # The busiest rank sets the time: the one that sends, or receives, most.
    message_bytes = total_bytes / min(senders, receivers)
    far = cluster.tier(min(cluster.num_gpus, max(source.num_ranks, destination.num_ranks) + 1))
    moved_s = send_s(far, message_bytes=message_bytes)
    if destination.sequence_parallel or destination.tp == 1:
        return moved_s
    tensor = Group.of(cluster, size=destination.tp, stride=1)
    kept_bytes = total_bytes / (destination.dp * destination.cp)
    return moved_s + all_gather_s(tensor, total_bytes=kept_bytes)


def rows_are_in_place(source: ParallelSizes, destination: ParallelSizes) -> bool:
    """Whether every rank that takes rows has made those that it needs, on equal ranks.

    A source without context parallelism of its own is on the destination's first context-parallel
    ranks; what Megatron has them do, it has all context-parallel ranks do alike.
    """
    return (
        source.tp == destination.tp
        and source.dp == destination.dp
        and source.cp in (1, destination.cp)
    )
