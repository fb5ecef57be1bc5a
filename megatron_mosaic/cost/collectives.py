"""Times of collectives, by latency and by bandwidth of the links that a group really crosses."""

from dataclasses import dataclass

from megatron_mosaic.cluster.spec import Cluster, LinkTier


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """Ranks that communicate, as they lie on the cluster.

    Args:
        size: Ranks.
        near_size: Those of them that share the fastest links that any two of them share.
        near: Those links.
        far: Links between such blocks; the same where one block holds all.
    """

    size: int
    near_size: int
    near: LinkTier
    far: LinkTier

    @classmethod
    def of(cls, cluster: Cluster, *, size: int, stride: int) -> "Group":
        """The group of every ``stride``-th rank, ``size`` of them."""
        far = cluster.tier(stride * (size - 1) + 1 if size > 1 else 1)
        near, near_size = far, size
        for tier in cluster.tiers:
            if tier.span is None or tier.span >= stride * (size - 1) + 1:
                break
            if (inside := tier.span // stride) > 1:
                near, near_size = tier, inside
        return cls(size=size, near_size=near_size, near=near, far=far)

    @property
    def one_block(self) -> bool:
        """Whether the fastest links join all of it."""
        return self.near_size >= self.size


def _bandwidth(tier: LinkTier, message_bytes: float) -> float:
    return tier.bandwidth_bytes_per_s * tier.curve.share(message_bytes)


def all_gather_s(group: Group, *, total_bytes: float) -> float:
    """Time of an all-gather or, the other way round, of a reduce-scatter.

    A ring moves ``size - 1`` parts of ``size`` over every link. Where it leaves a block of near
    links, all ranks of the block send at once, each over links of its own.

    Args:
        group: Who takes part.
        total_bytes: Of the whole tensor.

    Source:
        Factor (n-1)/n: nccl-tests, doc/PERFORMANCE.md. Rings that share the far links: NCCL's
        multi-ring channels, one for each network interface.
    """
    if group.size <= 1 or total_bytes <= 0:
        return 0.0
    moved = total_bytes * (group.size - 1) / group.size
    near = _bandwidth(group.near, moved)
    if group.one_block:
        return (group.size - 1) * group.near.latency_s + moved / near
    far = _bandwidth(group.far, moved) * group.near_size
    blocks = group.size / group.near_size
    latency = (blocks - 1) * group.far.latency_s + (group.near_size - 1) * group.near.latency_s
    return latency + moved / min(near, far)


def all_reduce_s(group: Group, *, total_bytes: float) -> float:
    """Time of a ring all-reduce: a reduce-scatter and an all-gather."""
    return 2 * all_gather_s(group, total_bytes=total_bytes)


def all_to_all_s(group: Group, *, sent_bytes: float) -> float:
    """Time of an all-to-all in which each rank keeps its own share of what it sends.

    Args:
        group: Who takes part.
        sent_bytes: What one rank hands out, its own share included.
    """
    if group.size <= 1 or sent_bytes <= 0:
        return 0.0
    part = sent_bytes / group.size
    near = part * (group.near_size - 1)
    far = part * (group.size - group.near_size)
    near_s = near / _bandwidth(group.near, near) if near > 0 else 0.0
    far_s = far / _bandwidth(group.far, far) if far > 0 else 0.0
    latency = group.near.latency_s if group.one_block else group.far.latency_s
    return latency + max(near_s, far_s)


def send_s(tier: LinkTier, *, message_bytes: float) -> float:
    """Time of one message from one rank to another."""
    if message_bytes <= 0:
        return 0.0
    return tier.latency_s + message_bytes / _bandwidth(tier, message_bytes)
