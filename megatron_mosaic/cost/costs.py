"""What parts, modules, stages and steps cost: the numbers that pass between the cost functions."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from megatron_mosaic.cost.sizes import ParallelSizes
from megatron_mosaic.schedule.graph import Stage


@dataclass(frozen=True, kw_only=True, slots=True)
class PartCosts:
    """One part of a module (its input, a layer, or its output), on one rank, for one task.

    Times hold the exposed communication inside the part, which is also given apart.

    Args:
        forward_s: Forward pass.
        input_gradient_s: Gradient of the part's input.
        weight_gradient_s: Gradient of its weights.
        recompute_s: What the backward pass computes again.
        forward_communication_s: Exposed communication of the forward pass.
        backward_communication_s: Exposed communication of the backward pass.
        forward_imbalance_s: Time of the forward pass for which the slowest of the ranks that
            share the task computes longer than they do on average.
        backward_imbalance_s: Ditto of the backward pass.
        flops: Of the forward pass, on this rank.
        forward_bytes: What the forward pass reads and writes on this rank.
        input_gradient_bytes: Ditto the gradient of its input.
        weight_gradient_bytes: Ditto the gradient of its weights.
        recompute_bytes: Ditto what the backward pass computes again.
        forward_host_s: Time in which the host launches the forward pass; 0 with CUDA graphs.
        backward_host_s: Ditto the backward pass.
        parameters: Weights on this rank, without the experts'.
        expert_parameters: Weights of experts on this rank.
        trainable: Share of the weights that train; 0 is a frozen part.
        activation_bytes: Held from the forward to the backward pass.
        working_bytes: Held for a moment only, by the pass that is under way.
        closing_bytes: Held for a moment at the end of its backward pass, when nothing else of the
            task is held any more.
        weight_shapes: Rows and columns of the weights for which a placeholder of a gradient
            stays in memory, one for each shape.
    """

    forward_s: float = 0.0
    input_gradient_s: float = 0.0
    weight_gradient_s: float = 0.0
    recompute_s: float = 0.0
    forward_communication_s: float = 0.0
    backward_communication_s: float = 0.0
    forward_imbalance_s: float = 0.0
    backward_imbalance_s: float = 0.0
    flops: float = 0.0
    forward_bytes: float = 0.0
    input_gradient_bytes: float = 0.0
    weight_gradient_bytes: float = 0.0
    recompute_bytes: float = 0.0
    forward_host_s: float = 0.0
    backward_host_s: float = 0.0
    parameters: float = 0.0
    expert_parameters: float = 0.0
    trainable: float = 1.0
    activation_bytes: float = 0.0
    working_bytes: float = 0.0
    closing_bytes: float = 0.0
    weight_shapes: frozenset[tuple[int, int]] = frozenset()


class PartRun(NamedTuple):
    """Equal layers, one after the other."""

    count: int
    costs: PartCosts


@dataclass(frozen=True, kw_only=True, slots=True)
class ModuleCosts:
    """A module under some sizes.

    Args:
        name: Of the module.
        sizes: How it is split.
        input: What its first stage does before the layers.
        layers: All layers, in order.
        output: What its last stage does after them.
        hop_s: Time to hand a task's activations, or their gradient, to the next stage.
        hop_bytes: What a stage receives from the one before for one task.
    """

    name: str
    sizes: ParallelSizes
    input: PartCosts
    layers: tuple[PartRun, ...]
    output: PartCosts
    hop_s: float = 0.0
    hop_bytes: float = 0.0

    @property
    def num_layers(self) -> int:
        """Layers."""
        return sum(run.count for run in self.layers)

    def each_layer(self) -> Iterator[PartCosts]:
        """Yields the costs of the layers one by one."""
        for count, costs in self.layers:
            for _ in range(count):
                yield costs


@dataclass(frozen=True, kw_only=True, slots=True)
class StageCosts:
    """One pipeline stage of a module, on one rank.

    Args:
        forward_s: Forward pass of a task.
        backward_s: Backward pass of a task, as far as anybody needs it; 0 if nobody does.
        communication_s: Exposed communication in both.
        imbalance_s: Time of both for which the slowest rank computes longer than others do.
        hop_s: Time until the next stage has what this one made.
        sync_s: Exposed synchronisation of gradients and parameters, once in a step.
        optimizer_s: The optimizer's step.
        flops: Forward FLOPs of a task on the rank.
        forward_bytes: What a task's forward pass reads and writes on the rank.
        backward_bytes: Ditto its backward pass.
        forward_host_s: Time in which the host launches a task's forward pass.
        backward_host_s: Ditto its backward pass.
        memory: What does not depend on the schedule, and one task's activations.
    """

    forward_s: float
    backward_s: float
    communication_s: float = 0.0
    imbalance_s: float = 0.0
    hop_s: float = 0.0
    sync_s: float = 0.0
    optimizer_s: float = 0.0
    flops: float = 0.0
    forward_bytes: float = 0.0
    backward_bytes: float = 0.0
    forward_host_s: float = 0.0
    backward_host_s: float = 0.0
    memory: "StageMemory"


@dataclass(frozen=True, kw_only=True, slots=True)
class StageMemory:
    """Memory of one stage on one rank, in bytes.

    Args:
        weights: Parameters.
        gradients: Accumulated gradients.
        optimizer: The optimizer's state.
        activations_per_task: Held from the forward to the backward pass of one task.
        working: Held for a moment, such as logits.
        buffers: Held all the time by libraries.
    """

    weights: float = 0.0
    gradients: float = 0.0
    optimizer: float = 0.0
    activations_per_task: float = 0.0
    working: float = 0.0
    buffers: float = 0.0

    def total(self, *, live_tasks: float) -> float:
        """Peak with a number of tasks between their passes."""
        fixed = self.weights + self.gradients + self.optimizer + self.working
        fixed += self.buffers
        return fixed + live_tasks * self.activations_per_task


@dataclass(frozen=True, kw_only=True, slots=True)
class ModuleInStep:
    """A module as a step runs it.

    Args:
        name: Of the module.
        stages: Its pipeline stages.
        chunks: Virtual stages of each rank.
        shared: Whether ranks that host it also host the language model.
        entry_s: Time of the boundary transfer that brings its input to its task; 0 if it has
            none, or if ``hop_s`` of the last stage before says it.
        task_microbatches: Microbatches of one of its tasks; None is the step's encoder group on
            shared ranks, and 1 on its own.
    """

    name: str
    stages: tuple[StageCosts, ...]
    chunks: int = 1
    shared: bool = False
    entry_s: float = 0.0
    task_microbatches: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class StepBreakdown:
    """Where the time of a step goes on its busiest rank, in seconds.

    ``bubble_s`` is what that rank waits; others compute less and wait longer. ``imbalance_s`` is
    what it computes more than the mean of the ranks that share its tasks: tokens of a sequence
    that cost more than others', or larger images.
    """

    compute_s: float
    communication_s: float
    bubble_s: float
    sync_s: float
    optimizer_s: float
    imbalance_s: float = 0.0

    @property
    def step_s(self) -> float:
        """All of it."""
        busy_s = self.compute_s + self.imbalance_s + self.communication_s
        return busy_s + self.bubble_s + self.sync_s + self.optimizer_s


@dataclass(frozen=True, kw_only=True, slots=True)
class StepEstimate:
    """What a plan costs.

    Args:
        breakdown: Its time.
        memory: Bytes by term of every different kind of rank, keyed by the stages it hosts.
        flops: Model FLOPs of the whole step, without what is computed again.
        num_gpus: GPUs of the plan, idle ones too.
    """

    breakdown: StepBreakdown
    memory: Mapping[tuple[Stage, ...], Mapping[str, float]]
    flops: float
    num_gpus: int

    @property
    def step_s(self) -> float:
        """Seconds of a step."""
        return self.breakdown.step_s

    @property
    def peak_bytes(self) -> float:
        """Of the fullest rank."""
        return max(sum(terms.values()) for terms in self.memory.values())
