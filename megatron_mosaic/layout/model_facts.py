"""Checks the placement of a module against what the training script builds."""

from dataclasses import dataclass

from megatron_mosaic.errors import LayoutError
from megatron_mosaic.layout.placement import ModulePlacement


@dataclass(frozen=True, kw_only=True, slots=True)
class ModuleFacts:
    """Sizes of one module that limit how it can be split, by Megatron's names.

    Args:
        vocab_size: Rows of the embedding after padding; ``None`` for a module without one.
        sequence_length: Tokens of one sample; ``None`` where it varies.
        num_experts: Experts of a mixture-of-experts layer; ``None`` for a dense module.
        moe_ffn_hidden_size: Hidden size of one expert; ``None`` for a dense module.
    """

    num_layers: int
    num_attention_heads: int
    num_query_groups: int
    hidden_size: int
    ffn_hidden_size: int
    vocab_size: int | None = None
    sequence_length: int | None = None
    num_experts: int | None = None
    moe_ffn_hidden_size: int | None = None


def check_module(placement: ModulePlacement, facts: ModuleFacts) -> None:
    """Checks that one module can be split as its placement says.

    Raises:
        LayoutError: A parallel size does not divide what it splits.
    """
    _check_tensor_parallel(placement, facts)
    _check_stages(placement, facts)
    _check_sequence(placement, facts)
    _check_experts(placement, facts)


def _check_tensor_parallel(placement: ModulePlacement, facts: ModuleFacts) -> None:
    tp = placement.tensor_model_parallel_size
    where = f"modules.{placement.name}: tensor_model_parallel_size={tp} must"
    for field in ("num_attention_heads", "ffn_hidden_size", "vocab_size"):
        size = getattr(facts, field)
        if size is not None and size % tp:
            raise LayoutError(f"{where} divide {field}={size}; choose a divisor of it")
    if facts.num_query_groups % tp and tp % facts.num_query_groups:
        raise LayoutError(
            f"{where} divide num_query_groups={facts.num_query_groups} or be a multiple of it; "
            f"choose such a size"
        )


def _check_stages(placement: ModulePlacement, facts: ModuleFacts) -> None:
    if placement.layers_per_stage is not None:
        if sum(placement.layers_per_stage) != facts.num_layers:
            raise LayoutError(
                f"modules.{placement.name}: layers_per_stage={list(placement.layers_per_stage)} "
                f"must sum to num_layers={facts.num_layers}, not "
                f"{sum(placement.layers_per_stage)}; move the difference to a stage"
            )
    elif facts.num_layers % placement.num_stages:
        field = f"pipeline_model_parallel_size={placement.pipeline_model_parallel_size}"
        if placement.virtual_pipeline_model_parallel_size > 1:
            field += (
                f" * virtual_pipeline_model_parallel_size="
                f"{placement.virtual_pipeline_model_parallel_size}"
            )
        raise LayoutError(
            f"modules.{placement.name}: {field} must divide num_layers={facts.num_layers}; choose "
            f"a divisor of it or write layers_per_stage"
        )


def _check_sequence(placement: ModulePlacement, facts: ModuleFacts) -> None:
    # Context parallelism cuts a sequence into two chunks per rank; sequence parallelism then
    # divides what a rank has.
    tp = placement.tensor_model_parallel_size if placement.sequence_parallel else 1
    chunks = 2 * placement.context_parallel_size if placement.context_parallel_size > 1 else 1
    if facts.sequence_length is not None and facts.sequence_length % (tp * chunks):
        raise LayoutError(
            f"modules.{placement.name}: sequence_length={facts.sequence_length} must be a multiple "
            f"of {tp * chunks}, into which sequence and context parallelism cut it; "
            f"pad the sequence or lower tensor_model_parallel_size or context_parallel_size"
        )


def _check_experts(placement: ModulePlacement, facts: ModuleFacts) -> None:
    where = f"modules.{placement.name}"
    ep, expt_tp = placement.expert_model_parallel_size, placement.expert_shape.expt_tp
    if facts.num_experts is None:
        if placement.splits_experts:
            raise LayoutError(
                f"{where}: expert_model_parallel_size={ep} with expert_tensor_parallel_size="
                f"{expt_tp} must not be planned for a model with num_experts=None; remove the "
                f"keys or give the model experts"
            )
        return
    if facts.num_experts % ep:
        raise LayoutError(
            f"{where}: expert_model_parallel_size={ep} must divide num_experts="
            f"{facts.num_experts}; choose a divisor of it"
        )
    if facts.moe_ffn_hidden_size is not None and facts.moe_ffn_hidden_size % expt_tp:
        raise LayoutError(
            f"{where}: expert_tensor_parallel_size={expt_tp} must divide moe_ffn_hidden_size="
            f"{facts.moe_ffn_hidden_size}; choose a divisor of it"
        )
    if placement.tensor_model_parallel_size > 1 and not placement.sequence_parallel:
        # Megatron refuses it in the first training step.
        raise LayoutError(
            f"{where}: sequence_parallel=false must be true with num_experts={facts.num_experts} "
            f"and tensor_model_parallel_size={placement.tensor_model_parallel_size}; add "
            f"'sequence_parallel: true'"
        )
