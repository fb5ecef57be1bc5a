"""From a recipe to a ``ConfigContainer`` of Megatron-Bridge."""

# Megatron-Bridge is optional.
# pyright: reportMissingImports=false

from typing import TYPE_CHECKING, Any

from megatron_mosaic.layout.placement import LANGUAGE
from megatron_mosaic.planner.emit.bridge import samples_of_microbatch
from megatron_mosaic.recipes.bridge import require_bridge
from megatron_mosaic.recipes.catalog import Recipe, find_recipe

if TYPE_CHECKING:
    from megatron.bridge.training.config import ConfigContainer

HUB_NAMES = {
    "qwen2.5-vl-7b": "Qwen/Qwen2.5-VL-7B-Instruct",
    "qwen3-vl-30b-a3b": "Qwen/Qwen3-VL-30B-A3B-Instruct",
}
"""Models whose layers are of Bridge's own providers, by their names on Hugging Face."""


def config_of(name: str) -> "ConfigContainer":
    """Makes the configuration of a recipe.

    Raises:
        HostError: Megatron-Bridge is not installed.
    """
    recipe = find_recipe(name)
    require_bridge()
    from megatron.bridge.recipes.common import _pretrain_common

    cfg = _pretrain_common()
    plan = recipe.plan()
    hub_name = HUB_NAMES.get(recipe.model)
    cfg.model = _standard_provider(recipe, hub_name) if hub_name else _mimo_provider(recipe)

    # Batch: MIMO counts the samples of all replicas, the standard loop those of one.
    cfg.train.micro_batch_size = plan.micro_batch_size if hub_name else samples_of_microbatch(plan)
    cfg.train.global_batch_size = plan.global_batch_size

    # Data: mock until a data set is given; images, sounds and text share the sequence.
    cfg.dataset.seq_length = recipe.spec().sequence_length
    cfg.tokenizer.tokenizer_type = "NullTokenizer"
    cfg.tokenizer.vocab_size = recipe.spec().language.input.vocab_size  # type: ignore[union-attr]
    cfg.peft = None

    # What the planner's prediction counts on.
    assumed = (plan.inputs or {}).get("arguments", ())
    cfg.ddp.use_distributed_optimizer = "--use-distributed-optimizer" in assumed
    cfg.ddp.overlap_grad_reduce = "--overlap-grad-reduce" in assumed
    cfg.ddp.overlap_param_gather = "--overlap-param-gather" in assumed

    # State that moves between layouts.
    cfg.checkpoint.ckpt_format = "torch_dist"
    cfg.checkpoint.dist_ckpt_optim_fully_reshardable = True
    return cfg


def _mimo_provider(recipe: Recipe) -> Any:
    from megatron_mosaic.recipes.providers import MosaicProvider
    from megatron_mosaic.recipes.specs import audio_spec, language_spec, vision_spec

    model = recipe.spec()
    make = {"vision": vision_spec, "audio": audio_spec}
    encoders = {name: each for name, each in model.modules.items() if name != LANGUAGE}
    return MosaicProvider(
        mosaic_plan=str(recipe.plan_path),
        language_model_spec=language_spec(model),
        modality_submodules_spec={name: make[name](each) for name, each in encoders.items()},
        freeze_language_model=model.language.trainable == (),
        freeze_modality_encoders={
            name: not each.trains("layers") for name, each in encoders.items()
        },
        freeze_modality_projections={
            name: not each.trains("output") for name, each in encoders.items()
        },
    )


def _standard_provider(recipe: Recipe, hub_name: str) -> Any:
    from megatron.bridge import AutoBridge

    from megatron_mosaic.recipes import providers

    carriers = {
        "qwen2.5-vl-7b": providers.MosaicQwen25VLProvider,
        "qwen3-vl-30b-a3b": providers.MosaicQwen3VLMoEProvider,
    }
    standard = AutoBridge.from_hf_pretrained(hub_name).to_megatron_provider(load_weights=False)
    provider = carriers[recipe.model].of(standard, mosaic_plan=str(recipe.plan_path))
    provider.seq_length = recipe.spec().sequence_length
    return provider
