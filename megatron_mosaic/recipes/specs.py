"""Models as Megatron's specs, from the numbers of a model file. Importing this needs Megatron."""

from math import isqrt
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.models.mimo.submodules.audio import AudioModalitySubmodules
from megatron.core.models.mimo.submodules.vision import VisionModalitySubmodules
from megatron.core.models.vision.clip_vit_model import CLIPViTModel
from megatron.core.models.vision.multimodal_projector import MultimodalProjector
from megatron.core.models.vision.vit_layer_specs import (
    get_vit_layer_with_local_spec,
    get_vit_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.spec_utils import ModuleSpec, get_submodules
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_mosaic.model.parameters import padded_vocab_size
from megatron_mosaic.model.spec import (
    LanguageHead,
    ModelSpec,
    Patches,
    Projector,
    TokenEmbedding,
)
from megatron_mosaic.model.spec import ModuleSpec as Module
from megatron_mosaic.recipes.language_geometry import transformer_sizes


def transformer_config(module: Module) -> TransformerConfig:
    """Makes the configuration of a module's layers."""
    sizes = transformer_sizes(module)
    return TransformerConfig(
        **sizes,
        activation_func=F.silu if sizes["gated_linear_unit"] else F.gelu,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        bf16=True,
        params_dtype=torch.bfloat16,
        pipeline_dtype=torch.bfloat16,
    )


def language_spec(model: ModelSpec) -> ModuleSpec:
    """Makes the spec of the language model."""
    language = model.language
    sizes = transformer_sizes(language)
    layers = get_gpt_layer_with_transformer_engine_spec if HAVE_TE else get_gpt_layer_local_spec
    embedding = language.input
    assert isinstance(embedding, TokenEmbedding)
    return ModuleSpec(
        module=GPTModel,
        params={
            "config": transformer_config(language),
            "transformer_layer_spec": layers(
                num_experts=sizes.get("num_moe_experts"),
                moe_grouped_gemm=bool(sizes.get("num_moe_experts")),
                qk_layernorm=sizes["qk_layernorm"],
            ),
            "vocab_size": padded_vocab_size(embedding.vocab_size),
            "max_sequence_length": model.sequence_length,
            "position_embedding_type": "learned_absolute" if embedding.num_positions else "rope",
            # A text tower has no logits: shared weights are none of their own.
            "share_embeddings_and_output_weights": not isinstance(language.output, LanguageHead)
            or language.output.tied,
        },
    )


def vision_spec(module: Module) -> ModuleSpec:
    """Makes the spec of an image encoder and its projector: CLIP's with a norm after the patches.

    Without one it is SigLIP's. Megatron's CLIP has no norm after its last layer.
    """
    patches = module.input
    assert isinstance(patches, Patches)
    patch_dim = isqrt(patches.values // 3)
    side = isqrt(round(module.tokens_per_item.mean)) * patch_dim
    layers = (
        get_vit_layer_with_transformer_engine_spec if HAVE_TE else get_vit_layer_with_local_spec
    )
    tower = ModuleSpec(
        module=CLIPViTModel,
        params={
            "transformer_config": transformer_config(module),
            "transformer_layer_spec": layers(),
            "patch_dim": patch_dim,
            "img_h": side,
            "img_w": side,
            "add_class_token": patches.extra_tokens > 0,
            "class_token_len": patches.extra_tokens,
            **_norms(),
            "model_subtype": "clip" if patches.normed else "siglip",
        },
    )
    return _with_projector(VisionModalitySubmodules, {"vit": tower}, module)


def _norms() -> dict[str, Any]:
    """The norms beside the layers: without Transformer Engine CLIPViTModel's own cannot be built.

    Source:
        megatron/core/models/vision/clip_vit_model.py, core_v0.19.0: torch's LayerNorm, which takes
        no configuration.
    """
    if HAVE_TE:
        return {}
    return {"ln_pre_impl": WrappedTorchNorm, "ln_post_impl": WrappedTorchNorm}


def audio_spec(module: Module) -> ModuleSpec:
    """Makes the spec of Whisper's encoder and its projector."""
    from megatron_mosaic.recipes.whisper import WhisperTower

    sizes = transformer_sizes(module)
    tower = ModuleSpec(
        module=WhisperTower,
        params={
            "num_layers": sizes["num_layers"],
            "hidden_size": sizes["hidden_size"],
            "num_attention_heads": sizes["num_attention_heads"],
            "ffn_hidden_size": sizes["ffn_hidden_size"],
        },
    )
    return _with_projector(AudioModalitySubmodules, {"whisper": tower}, module)


def _with_projector(
    submodules: type[Any], encoders: dict[str, ModuleSpec], module: Module
) -> ModuleSpec:
    projector = module.output
    assert isinstance(projector, Projector)
    return ModuleSpec(
        module=submodules,
        submodules={"encoders": encoders, "input_projections": [_projector_spec(projector)]},
    )


def _projector_spec(projector: Projector) -> ModuleSpec:
    """Makes the spec of a projector: one multiplication, or two with something in between."""
    *_, before_last, last = projector.sizes
    config = TransformerConfig(
        num_layers=1,
        hidden_size=last,
        num_attention_heads=1,
        ffn_hidden_size=before_last,
        activation_func=F.gelu,
        add_bias_linear=projector.bias,
        bf16=True,
        params_dtype=torch.bfloat16,
    )
    mlp = get_submodules(get_gpt_layer_local_spec().submodules.mlp)
    return ModuleSpec(
        module=MultimodalProjector,
        params={
            "config": config,
            "submodules": mlp,
            "projector_type": "affine" if len(projector.sizes) == 2 else "mlp",
            "input_size": projector.sizes[0],
        },
    )
