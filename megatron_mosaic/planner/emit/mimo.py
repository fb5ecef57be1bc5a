"""Arguments of Megatron-LM's own example of heterogeneous training, ``examples/mimo``."""

from collections.abc import Iterator

from megatron_mosaic.layout.plan import Plan
from megatron_mosaic.planner.emit.emission import (
    Emission,
    InexpressibleError,
    Launch,
    check_pipelined,
    check_tiling,
    environment_notes,
    refuse_attention_and_items,
    refuse_other_recompute,
    refuse_outputs,
    refuse_uneven_stages,
    refuse_virtual_stages,
    shell_lines,
)
from megatron_mosaic.planner.emit.megatron import Option, recompute_options


def emit_mimo(plan: Plan, launch: Launch) -> Emission:
    """Writes arguments of ``pretrain_mimo.py``: one encoder from rank 0 on, then the LLM.

    Source:
        examples/mimo/training/args.py, core_v0.19.0, for the arguments and their rules;
        examples/mimo/model_providers/nemotron_moe_vlm.py for sequence parallelism.
    """
    refuse_outputs(plan)
    refuse_attention_and_items(plan)
    check_tiling(plan)
    if plan.encoders:
        check_pipelined(plan)
    _check_sizes(plan)
    refuse_uneven_stages(plan.language)
    refuse_virtual_stages(plan.language)
    refuse_other_recompute(plan)
    notes = tuple(
        f"modules.{name}: trainable={list(placement.trainable)} is for the training script to keep"
        for name, placement in plan.modules.items()
        if placement.trainable is not None
    )
    return Emission(text=shell_lines(*_options(plan)), notes=(*notes, *environment_notes(plan)))


def _check_sizes(plan: Plan) -> None:
    language = plan.language
    if len(plan.encoders) > 1:
        raise InexpressibleError(f"modules: encoders={list(plan.encoders)} must be one at most")
    for name in plan.encoders:
        encoder = plan.modules[name]
        if min(encoder.ranks) != 0:
            raise InexpressibleError(
                f"modules.{name}: first rank={min(encoder.ranks)} must be 0, before language"
            )
        for field in ("context_parallel_size", "pipeline_model_parallel_size"):
            if getattr(encoder, field) != 1:
                raise InexpressibleError(
                    f"modules.{name}: {field}={getattr(encoder, field)} must be 1"
                )
        samples = plan.micro_batch_size * language.data_parallel_size
        if samples % encoder.data_parallel_size:
            raise InexpressibleError(
                f"modules.{name}: data_parallel_size={encoder.data_parallel_size} must divide "
                f"micro_batch_size * data_parallel_size of language={samples}"
            )
    if language.context_parallel_size != 1:
        raise InexpressibleError(
            f"modules.language: context_parallel_size={language.context_parallel_size} must be 1"
        )
    split = language.tensor_model_parallel_size > 1
    if language.sequence_parallel != split:
        raise InexpressibleError(
            f"modules.language: sequence_parallel={str(not split).lower()} must be "
            f"{str(split).lower()} with tensor_model_parallel_size="
            f"{language.tensor_model_parallel_size}"
        )


def _options(plan: Plan) -> Iterator[Option]:
    language = plan.language
    for name in plan.encoders:
        yield "--encoder-tp", f"{plan.modules[name].tensor_model_parallel_size}"
        yield "--encoder-dp", f"{plan.modules[name].data_parallel_size}"
    if not plan.encoders:
        yield ("--llm-only",)
    yield "--llm-offset", f"{min(language.ranks)}"
    yield "--llm-tp", f"{language.tensor_model_parallel_size}"
    yield "--llm-pp", f"{language.pipeline_model_parallel_size}"
    yield "--llm-dp", f"{language.data_parallel_size}"
    if language.splits_experts:
        yield "--llm-ep", f"{language.expert_shape.ep}"
        yield "--llm-expt-tp", f"{language.expert_shape.expt_tp}"
    yield "--micro-batch-size", f"{plan.micro_batch_size}"
    yield "--global-batch-size", f"{plan.global_batch_size}"
    yield from recompute_options(language)
    # The example refuses to run without these two.
    yield ("--use-distributed-optimizer",)
    yield ("--calculate-per-token-loss",)
