"""Costs of pipeline stages, from those of a module's parts."""

from dataclasses import dataclass

from megatron_mosaic.cluster.spec import Cluster
from megatron_mosaic.cost.collectives import Group, all_gather_s, all_reduce_s
from megatron_mosaic.cost.costs import ModuleCosts, PartCosts, StageCosts, StageMemory
from megatron_mosaic.cost.efficiency import memory_s
from megatron_mosaic.cost.exposed import waited_s
from megatron_mosaic.cost.operations import CAST_BYTES
from megatron_mosaic.cost.sizes import TrainingSettings
from megatron_mosaic.model.spec import Precision

# Parameters of a bucket of gradients that is reduced on its own.
# Source: megatron/core/distributed/distributed_data_parallel.py, core_v0.19.0: the larger of 40
# million and a million for each replica.
_BUCKET = 40_000_000
_BUCKET_PER_REPLICA = 1_000_000


@dataclass(frozen=True, kw_only=True, slots=True)
class StageWork:
    """What one stage computes for a task, and what of it others need.

    Args:
        parts: Input, layers and output on the stage, in order.
        upstream: Whether anything before the stage trains.
    """

    parts: tuple[PartCosts, ...]
    upstream: bool


def backward_s(part: PartCosts, *, upstream: bool) -> float:
    """Time of a part's backward pass: what trains, and what somebody before it needs.

    Args:
        part: The part.
        upstream: Whether anything trains at or before the part's input.

    Source:
        Frozen parts: Cornstarch, arXiv 2503.11367, section on frozen-aware pipelines.
    """
    needed = upstream or part.trainable > 0
    if not needed:
        return 0.0
    return part.trainable * part.weight_gradient_s + part.input_gradient_s + part.recompute_s


def backward_bytes(part: PartCosts) -> float:
    """What a part's backward pass reads and writes, if there is one."""
    trained = part.trainable * part.weight_gradient_bytes
    return trained + part.input_gradient_bytes + part.recompute_bytes


def stage_costs(
    work: StageWork,
    *,
    module: ModuleCosts,
    cluster: Cluster,
    settings: TrainingSettings,
    precision: Precision = "bf16",
    memory: StageMemory | None = None,
) -> StageCosts:
    """Estimates one stage: a task's passes, and what happens once in a step."""
    forward = sum(part.forward_s for part in work.parts)
    backward, communication, imbalance, upstream = 0.0, 0.0, 0.0, work.upstream
    moved_back = host_back_s = 0.0
    for part in work.parts:
        seconds = backward_s(part, upstream=upstream)
        backward += seconds
        communication += part.forward_communication_s
        communication += part.backward_communication_s if seconds else 0.0
        imbalance += part.forward_imbalance_s
        imbalance += part.backward_imbalance_s if seconds else 0.0
        moved_back += backward_bytes(part) if seconds else 0.0
        host_back_s += part.backward_host_s if seconds else 0.0
        upstream = upstream or part.trainable > 0
    groups = _Groups.of(work, module, cluster)
    if settings.fsdp:
        waits = groups.sharded_waits(settings, forward_s=forward, backward_s=backward)
        forward, backward = forward + waits[0], backward + waits[1]
        communication += sum(waits)
    if module.sizes.chunks > 1 and not settings.overlap_p2p:
        # Each chunk waits for its message; what plain 1F1B waits for, the step counts.
        hops_s = module.hop_s * module.sizes.chunks
        forward += hops_s
        backward += hops_s if backward else 0.0
        communication += hops_s * (2 if backward else 1)
    return StageCosts(
        forward_s=forward,
        backward_s=backward,
        communication_s=communication,
        imbalance_s=imbalance,
        hop_s=module.hop_s,
        sync_s=groups.sync_s(settings, forward_s=forward, backward_s=backward),
        optimizer_s=groups.optimizer_s(settings, precision),
        flops=sum(part.flops for part in work.parts),
        forward_bytes=sum(part.forward_bytes for part in work.parts),
        backward_bytes=moved_back,
        forward_host_s=sum(part.forward_host_s for part in work.parts),
        backward_host_s=host_back_s,
        memory=memory or StageMemory(),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Groups:
    """Replicas of a stage's weights, dense and of experts, and how many weights train."""

    cluster: Cluster
    dense: Group
    experts: Group
    dense_weights: float
    expert_weights: float
    trained_dense: float
    trained_experts: float

    @classmethod
    def of(cls, work: StageWork, module: ModuleCosts, cluster: Cluster) -> "_Groups":
        sizes = module.sizes
        return cls(
            cluster=cluster,
            dense=Group.of(cluster, size=sizes.cp * sizes.dp, stride=sizes.tp),
            experts=Group.of(cluster, size=max(1, sizes.expert_dp), stride=sizes.etp * sizes.ep),
            dense_weights=sum(part.parameters for part in work.parts),
            expert_weights=sum(part.expert_parameters for part in work.parts),
            trained_dense=sum(part.parameters * part.trainable for part in work.parts),
            trained_experts=sum(part.expert_parameters * part.trainable for part in work.parts),
        )

    def gathers_s(self, bytes_per_weight: float, *, trained: bool) -> float:
        """Time to gather, or to reduce and scatter, all weights of the stage."""
        dense = self.trained_dense if trained else self.dense_weights
        experts = self.trained_experts if trained else self.expert_weights
        return all_gather_s(self.dense, total_bytes=bytes_per_weight * dense) + all_gather_s(
            self.experts, total_bytes=bytes_per_weight * experts
        )

    def sharded_waits(
        self, settings: TrainingSettings, *, forward_s: float, backward_s: float
    ) -> tuple[float, float]:
        """What a microbatch waits for weights and gradients that all replicas share."""
        gathered = self.gathers_s(2, trained=False)
        reduced = self.gathers_s(settings.gradient_bytes, trained=True)
        cost = self.cluster.gpu.overlap_cost
        return (
            waited_s(gathered, behind_s=forward_s, cost=cost),
            waited_s(gathered + reduced, behind_s=backward_s, cost=cost) if backward_s else 0.0,
        )

    def sync_s(self, settings: TrainingSettings, *, forward_s: float, backward_s: float) -> float:
        """Exposed time of reducing gradients and gathering weights, once in a step.

        The last microbatch's backward pass hides all but the last bucket of gradients, and the
        first forward pass all but the first bucket of weights.
        """
        if settings.fsdp or not self.trained_dense + self.trained_experts:
            return 0.0
        if not settings.distributed_optimizer:
            return all_reduce_s(
                self.dense, total_bytes=settings.gradient_bytes * self.trained_dense
            ) + all_reduce_s(
                self.experts, total_bytes=settings.gradient_bytes * self.trained_experts
            )
        reduced = self.gathers_s(settings.gradient_bytes, trained=True)
        gathered = self.gathers_s(2, trained=True)
        bucket = max(_BUCKET, _BUCKET_PER_REPLICA * self.dense.size)
        cost = self.cluster.gpu.overlap_cost
        last = min(1.0, bucket / (self.trained_dense + self.trained_experts))
        if settings.overlap_grad_reduce:
            hidden = waited_s((1 - last) * reduced, behind_s=backward_s, cost=cost)
            reduced = last * reduced + hidden
        if settings.overlap_param_gather:
            hidden = waited_s((1 - last) * gathered, behind_s=forward_s, cost=cost)
            gathered = last * gathered + hidden
        return reduced + gathered

    def optimizer_s(self, settings: TrainingSettings, precision: Precision) -> float:
        """Time of the optimizer's step, which memory bounds.

        Adam reads gradient, weight and two moments, and writes all but the gradient, in fp32; the
        weight is copied to 2 bytes; the norm of gradients reads them once more, and their buffer
        is set to zero before the next step.
        """
        gradient = settings.gradient_bytes
        split = settings.distributed_optimizer or settings.fsdp
        own = self.trained_dense / (self.dense.size if split else 1)
        own += self.trained_experts / (self.experts.size if split else 1)
        held = (self.trained_dense + self.trained_experts) if not settings.fsdp else own
        moved = own * (2 * gradient + 24 + 6) + held * gradient
        if precision in CAST_BYTES:
            # Weights are quantised once in a step, before the first microbatch.
            moved += held * CAST_BYTES[precision]
        measured = "optimizer" in self.cluster.gpu.curves
        return memory_s(self.cluster.gpu, moved, curve="optimizer" if measured else "elementwise")
