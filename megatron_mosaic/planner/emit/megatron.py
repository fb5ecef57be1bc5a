"""Stock arguments of Megatron-LM, for plans in which one layout serves all modules."""

from collections.abc import Iterator

from megatron_mosaic.layout.placement import LANGUAGE, ModulePlacement
from megatron_mosaic.layout.plan import Plan
from megatron_mosaic.layout.ranks import show_ranks
from megatron_mosaic.planner.emit.emission import (
    Emission,
    InexpressibleError,
    Launch,
    check_single_microbatches,
    environment_notes,
    refuse_attention_and_items,
    refuse_other_recompute,
    refuse_outputs,
    shell_lines,
)

Option = tuple[str, ...]


def emit_megatron(plan: Plan, launch: Launch) -> Emission:
    """Writes arguments that any Megatron takes, without this package.

    Encoders inherit the language model's sizes and run on its first pipeline stage, as
    ``pretrain_vlm.py`` has them.
    """
    language = plan.language
    if language.ranks != tuple(range(plan.world_size)):
        raise InexpressibleError(
            f"modules.language: ranks={show_ranks(language.ranks)} must be all ranks of the run "
            f"in order, {show_ranks(range(plan.world_size))}"
        )
    refuse_outputs(plan)
    refuse_attention_and_items(plan)
    for name in plan.encoders:
        _check_encoder(plan.modules[name], language)
    refuse_other_recompute(plan)
    check_single_microbatches(plan)
    options = [
        *size_options(plan),
        *stage_options(language),
        *_freeze_options(plan),
        *_assumed_options(plan),
    ]
    return Emission(text=shell_lines(*options), notes=(*_notes(plan), *environment_notes(plan)))


def size_options(plan: Plan) -> Iterator[Option]:
    """Yields options for everything but the split into stages and what is frozen."""
    language = plan.language
    yield "--tensor-model-parallel-size", f"{language.tensor_model_parallel_size}"
    yield "--pipeline-model-parallel-size", f"{language.pipeline_model_parallel_size}"
    if language.context_parallel_size > 1:
        yield "--context-parallel-size", f"{language.context_parallel_size}"
    if language.splits_experts:
        yield "--expert-model-parallel-size", f"{language.expert_shape.ep}"
        yield "--expert-tensor-parallel-size", f"{language.expert_shape.expt_tp}"
    if language.sequence_parallel:
        yield ("--sequence-parallel",)
    yield "--micro-batch-size", f"{plan.micro_batch_size}"
    yield "--global-batch-size", f"{plan.global_batch_size}"
    yield from recompute_options(language)


def recompute_options(placement: ModulePlacement) -> Iterator[Option]:
    """Yields options for what a backward pass computes again."""
    if placement.recompute is not None:
        yield "--recompute-granularity", placement.recompute
    if placement.recompute == "full":
        yield "--recompute-method", "uniform"
        yield "--recompute-num-layers", "1"


def stage_options(placement: ModulePlacement) -> Iterator[Option]:
    """Yields options for virtual stages and an uneven split: the oldest that can say it.

    Source:
        megatron/core/transformer/pipeline_parallel_layer_layout.py, core_v0.19.0: stages between
        bars, E the embedding, t a layer, L the loss.
    """
    split, virtual = placement.layers_per_stage, placement.virtual_pipeline_model_parallel_size
    if split is None or len(set(split)) == 1:
        if virtual > 1:
            yield "--num-virtual-stages-per-pipeline-rank", f"{virtual}"
        return
    if virtual > 1:
        yield _layout(split)
    elif len(set(split[1:])) == 1:
        yield "--decoder-first-pipeline-num-layers", f"{split[0]}"
    elif len(set(split[:-1])) == 1:
        yield "--decoder-last-pipeline-num-layers", f"{split[-1]}"
    elif len(set(split[1:-1])) == 1:
        yield "--decoder-first-pipeline-num-layers", f"{split[0]}"
        yield "--decoder-last-pipeline-num-layers", f"{split[-1]}"
    else:
        yield _layout(split)


def _layout(split: tuple[int, ...]) -> Option:
    layout = "|".join("t" if count == 1 else f"t*{count}" for count in split)
    return "--pipeline-model-parallel-layout", f"E{layout}L"


def _check_encoder(encoder: ModulePlacement, language: ModulePlacement) -> None:
    where = f"modules.{encoder.name}:"
    for field in ("tensor_model_parallel_size", "data_parallel_size"):
        own, expected = getattr(encoder, field), getattr(language, field)
        if own != expected:
            raise InexpressibleError(f"{where} {field}={own} must equal {expected} of language")
    for field in ("pipeline_model_parallel_size", "context_parallel_size"):
        if getattr(encoder, field) != 1:
            raise InexpressibleError(f"{where} {field}={getattr(encoder, field)} must be 1")
    tp, cp, dp, _ = language.shape
    first_stage = tuple(language.rank_at(tp=t, dp=d) for d in range(dp) for t in range(tp))
    if encoder.ranks != first_stage:
        which = "the first stage" if cp == 1 else "the first context-parallel ranks of stage 0"
        raise InexpressibleError(
            f"{where} ranks={show_ranks(encoder.ranks)} must be {show_ranks(first_stage)}, {which} "
            f"of language"
        )


def _assumed_options(plan: Plan) -> Iterator[Option]:
    """Yields what the planner's prediction counts on."""
    for argument in (plan.inputs or {}).get("arguments", ()):
        yield (str(argument),)


def _freeze_options(plan: Plan) -> Iterator[Option]:
    """Yields what ``pretrain_vlm.py`` freezes: its language model, its vision tower."""
    if plan.encoders and plan.language.trainable == ():
        yield ("--freeze-LM",)
    if plan.encoders == ("vision",) and plan.modules["vision"].trainable == ("projector",):
        yield ("--freeze-ViT",)


def _notes(plan: Plan) -> Iterator[str]:
    """Yields what the script must freeze by itself."""
    said = {option for (option,) in _freeze_options(plan)}
    for name, placement in plan.modules.items():
        option = {LANGUAGE: "--freeze-LM", "vision": "--freeze-ViT"}.get(name)
        if placement.trainable is not None and option not in said:
            yield (
                f"modules.{name}: trainable={list(placement.trainable)} is for the training "
                f"script to keep, no argument says it"
            )
