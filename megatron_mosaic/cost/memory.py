"""Memory of pipeline stages: weights, gradients, optimizer, activations, and what passes by."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

from megatron_mosaic.cost.activations import layer_keeps
from megatron_mosaic.cost.context import ContextTask
from megatron_mosaic.cost.costs import ModuleCosts, PartCosts, PartRun, StageMemory
from megatron_mosaic.cost.ends import (
    handed_bytes,
    input_closing_bytes,
    input_keeps,
    loss_working_bytes,
    output_keeps,
)
from megatron_mosaic.cost.kept import Kernels, TaskOnRank, total_bytes
from megatron_mosaic.cost.layer_split import even_split, split_runs
from megatron_mosaic.cost.sizes import ParallelSizes, TrainingSettings
from megatron_mosaic.cost.working import layer_working_bytes, weight_shapes
from megatron_mosaic.model.layers import Layer
from megatron_mosaic.model.parameters import (
    VOCAB_MULTIPLE,
    adapter_parameters,
    input_parameters,
    layer_parameters,
    mtp_parameters,
    output_parameters,
)
from megatron_mosaic.model.spec import ModuleSpec, Precision

# Adam's two moments, and the master copy of weights that are kept in 2 bytes, all in fp32.
# Source: Megatron-Core 0.19, optimizer/distrib_optimizer.py, "Data parallel sharding" in its docs.
MOMENT_BYTES = 8
MASTER_BYTES = 4
# Gradients that are kept in 2 bytes are copied for the optimizer's step.
# Source: the same file, ``_copy_model_grads_to_main_grads``.
GRADIENT_COPY_BYTES = 4


class ModuleParts(NamedTuple):
    """A module's parts, with what they hold and without their times."""

    input: PartCosts
    layers: tuple[PartRun, ...]
    output: PartCosts


def with_memory(costs: ModuleCosts, parts: ModuleParts) -> ModuleCosts:
    """Joins the times of a module's parts with what they hold."""
    return replace(
        costs,
        input=_joined(costs.input, parts.input),
        layers=tuple(
            PartRun(time.count, _joined(time.costs, held.costs))
            for time, held in zip(costs.layers, parts.layers, strict=True)
        ),
        output=_joined(costs.output, parts.output),
    )


def _joined(time: PartCosts, held: PartCosts) -> PartCosts:
    return replace(
        time,
        parameters=held.parameters,
        expert_parameters=held.expert_parameters,
        trainable=held.trainable,
        activation_bytes=held.activation_bytes,
        working_bytes=held.working_bytes,
        closing_bytes=held.closing_bytes,
        weight_shapes=held.weight_shapes,
    )


def module_parts(
    module: ModuleSpec,
    *,
    sizes: ParallelSizes,
    settings: TrainingSettings,
    samples: float,
    precision: Precision = "bf16",
    gradient_arrives: bool = False,
    kernels: Kernels | None = None,
    vocab_multiple: int = VOCAB_MULTIPLE,
    context: ContextTask | None = None,
) -> ModuleParts:
    """Computes what the parts of a module hold on one rank.

    Args:
        module: The module.
        sizes: How it is split.
        settings: What all modules have in common.
        samples: Samples of one task on one replica.
        precision: Of matrix multiplications.
        gradient_arrives: Whether a module that feeds this one wants a gradient.
        kernels: Who computes; ``None`` follows the settings.
        vocab_multiple: Number of which each rank's share of the vocabulary is a multiple.
        context: What a context-parallel rank has to do under a multimodal mask.
    """
    if kernels is None:
        kernels = "flash" if settings.flash_attention else "unfused"
    task = TaskOnRank.of(
        module, sizes=sizes, samples=samples, precision=precision, kernels=kernels,
        settings=settings,
    )  # fmt: skip
    if context is not None and sizes.cp > 1:
        # Tensors have room for the most tokens that a rank may have.
        task = replace(
            task,
            tokens=task.tokens * sizes.cp * context.tokens / context.length,
            received=context.received,
        )
    input_trains, layers_train = module.trains("input"), module.trains("layers")
    passes = gradient_arrives or (input_trains and module.input is not None)
    first = _input_part(
        module, task, gradient_passes=gradient_arrives, vocab_multiple=vocab_multiple
    )
    different = dict.fromkeys(layer for _, layer in module.layers)
    known = {layer: _layer_part(layer, module, task, gradient_passes=passes) for layer in different}
    layers = tuple(PartRun(count, known[layer]) for count, layer in module.layers)
    passes = passes or layers_train or module.adapters_train
    last = _output_part(
        module, task, settings, gradient_passes=passes, vocab_multiple=vocab_multiple
    )
    return ModuleParts(first, layers, last)


def _input_part(
    module: ModuleSpec, task: TaskOnRank, *, gradient_passes: bool, vocab_multiple: int
) -> PartCosts:
    trains, closing = module.trains("input"), 0.0
    if trains:
        closing = input_closing_bytes(module, task, multiple=vocab_multiple)
    return PartCosts(
        parameters=input_parameters(module, tp=task.sizes.tp, multiple=vocab_multiple),
        trainable=float(trains),
        activation_bytes=total_bytes(
            input_keeps(module, task), trains=trains, gradient_passes=gradient_passes
        ),
        closing_bytes=closing,
    )


def _layer_part(
    layer: Layer, module: ModuleSpec, task: TaskOnRank, *, gradient_passes: bool
) -> PartCosts:
    sizes = task.sizes
    counts = layer_parameters(
        layer, hidden_size=module.hidden_size, norm=module.norm, tp=sizes.tp, ep=sizes.ep,
        etp=sizes.etp,
    )  # fmt: skip
    dense, share, whole = counts.dense, 1.0, module.trains("layers")
    if not whole:
        added = 0
        if module.adapters_train:
            added = adapter_parameters(
                layer, hidden_size=module.hidden_size, lora_rank=module.lora_rank, tp=sizes.tp
            )
        dense += added
        share = added / (dense + counts.experts)
    kept = total_bytes(
        layer_keeps(layer, task, recompute=sizes.recompute),
        trains=share > 0,
        gradient_passes=gradient_passes,
    )
    backward = share > 0 or gradient_passes
    return PartCosts(
        parameters=dense,
        expert_parameters=counts.experts,
        trainable=share,
        activation_bytes=kept,
        working_bytes=layer_working_bytes(layer, task) if backward else 0.0,
        weight_shapes=weight_shapes(layer, task) if whole else frozenset(),
    )


def _output_part(
    module: ModuleSpec,
    task: TaskOnRank,
    settings: TrainingSettings,
    *,
    gradient_passes: bool,
    vocab_multiple: int,
) -> PartCosts:
    train = module.trains("output")
    kept = total_bytes(output_keeps(module, task), trains=train, gradient_passes=gradient_passes)
    working = 0.0
    if train or gradient_passes:
        working = loss_working_bytes(
            module, task, fused=settings.cross_entropy_fusion, multiple=vocab_multiple
        )
    sizes = task.sizes
    parameters = output_parameters(module, tp=sizes.tp, pp=sizes.pp, multiple=vocab_multiple)
    further = mtp_parameters(
        module, tp=sizes.tp, pp=sizes.pp, ep=sizes.ep, etp=sizes.etp, multiple=vocab_multiple
    )
    return PartCosts(
        parameters=parameters + further.dense,
        expert_parameters=further.experts,
        trainable=float(train),
        activation_bytes=kept + handed_bytes(module, task),
        working_bytes=working,
    )


def stage_memory(
    parts: Iterable[PartRun],
    *,
    sizes: ParallelSizes,
    settings: TrainingSettings,
    precision: Precision = "bf16",
) -> StageMemory:
    """Adds up the memory of a stage on one rank.

    Args:
        parts: Parts of the stage, with how often each occurs.
        sizes: How the module is split.
        settings: What all modules have in common.
        precision: Of matrix multiplications.

    Note:
        What the CUDA context and NCCL take is no part of it, but of a GPU's ``memory_bytes``;
        plans leave it free.
    """
    runs = [run for run in parts if run.count]
    weights = _Weights.of(runs, sizes=sizes, settings=settings)
    # In 8 bits Megatron keeps a byte of a weight for each direction that it is read in, with
    # --fp8-param-gather, instead of two bytes.
    weight_bytes = 4 if precision == "fp32" else 2
    state_bytes = MOMENT_BYTES + (MASTER_BYTES if weight_bytes == 2 else 0)
    gradient_bytes = 4 if weight_bytes == 4 else settings.gradient_bytes
    activations = sum(count * part.activation_bytes for count, part in runs)
    working = max((part.working_bytes for _, part in runs), default=0.0)
    closing = max((part.closing_bytes for _, part in runs), default=0.0)
    if gradient_bytes < 4:
        closing = max(closing, GRADIENT_COPY_BYTES * weights.owned)
    shapes = frozenset[tuple[int, int]]().union(*(part.weight_shapes for _, part in runs))
    return StageMemory(
        weights=weight_bytes * weights.held,
        gradients=gradient_bytes * weights.trained,
        optimizer=state_bytes * weights.owned,
        activations_per_task=activations,
        working=max(working, closing - activations) + weight_bytes * weights.gathered,
        buffers=sum(weight_bytes * rows * columns for rows, columns in shapes),
    )


class _Weights(NamedTuple):
    """Numbers of a stage's weights on one rank.

    Args:
        held: All that the rank keeps.
        trained: Those of which it keeps gradients.
        owned: Those that its optimizer updates.
        gathered: Those that it has whole for a moment only.
    """

    held: float
    trained: float
    owned: float
    gathered: float = 0.0

    @classmethod
    def of(
        cls, runs: Sequence[PartRun], *, sizes: ParallelSizes, settings: TrainingSettings
    ) -> "_Weights":
        dense = sum(count * part.parameters for count, part in runs)
        experts = sum(count * part.expert_parameters for count, part in runs)
        trained_dense = sum(n * part.parameters * part.trainable for n, part in runs)
        trained_experts = sum(n * part.expert_parameters * part.trainable for n, part in runs)
        replicas, expert_replicas = sizes.dp * sizes.cp, max(sizes.expert_dp, 1)
        shared = trained_dense / replicas + trained_experts / expert_replicas
        if settings.fsdp:
            # Two parts at a time have their whole weights: the one at work and the next.
            largest = max((p.parameters + p.expert_parameters for _, p in runs), default=0.0)
            held = dense / replicas + experts / expert_replicas
            return cls(held=held, trained=shared, owned=shared, gathered=2 * largest)
        trained = trained_dense + trained_experts
        owned = shared if settings.distributed_optimizer else trained
        return cls(held=dense + experts, trained=trained, owned=owned)


def split_layers(layers: Sequence[PartRun], layers_per_stage: Sequence[int]) -> list[list[PartRun]]:
    """Cuts runs of equal layers into stages."""
    stages = split_runs(layers, layers_per_stage)
    return [[PartRun(*run) for run in stage] for stage in stages]


def stages_memory(
    parts: ModuleParts,
    *,
    sizes: ParallelSizes,
    settings: TrainingSettings,
    precision: Precision = "bf16",
    layers_per_stage: Sequence[int] | None = None,
) -> tuple[StageMemory, ...]:
    """Computes the memory of every stage of a module.

    Args:
        parts: What its parts hold.
        sizes: How it is split.
        settings: What all modules have in common.
        precision: Of matrix multiplications.
        layers_per_stage: Layers of each stage; ``None`` is an even split, the first stages
            taking what is left over.
    """
    if layers_per_stage is None:
        number = sum(run.count for run in parts.layers)
        layers_per_stage = even_split(number, sizes.pp)
    stages = split_layers(parts.layers, layers_per_stage)
    stages[0].insert(0, PartRun(1, parts.input))
    stages[-1].append(PartRun(1, parts.output))
    return tuple(
        stage_memory(stage, sizes=sizes, settings=settings, precision=precision) for stage in stages
    )


def live_tasks(stage: int, *, num_stages: int, num_microbatches: int, chunks: int = 1) -> float:
    """Tasks of which a stage holds activations at most under 1F1B, in whole stages.

    Args:
        stage: Its index.
        num_stages: Stages of the pipeline.
        num_microbatches: Microbatches of a step.
        chunks: Virtual stages of each rank; with several, a task of one chunk counts as a part.

    Source:
        Narayanan et al., arXiv 2104.04473, section 2.2; warm-up of interleaved schedules as in
        Megatron-Core's schedules.py, ``get_pp_rank_microbatches``.
    """
    if chunks == 1:
        return min(num_stages - stage, num_microbatches)
    warmup = 2 * (num_stages - stage - 1) + (chunks - 1) * num_stages
    return min(warmup + 1, num_microbatches * chunks) / chunks
