"""Recipes in the form of Megatron-Bridge's, each with a plan that the planner made.

Importing this needs neither Megatron-Bridge nor torch; calling a recipe needs Bridge.
"""

# Megatron-Bridge is optional.
# pyright: reportMissingImports=false

from typing import TYPE_CHECKING

from megatron_mosaic.recipes.configs import config_of

if TYPE_CHECKING:
    from megatron.bridge.training.config import ConfigContainer


def llava_15_7b_sft_8gpu_h100_bf16_mosaic_config() -> "ConfigContainer":
    """LLaVA-1.5-7B, its tower frozen, vision and language on the same GPUs."""
    return config_of("llava_15_7b_sft_8gpu_h100_bf16")


def llava_15_7b_sft_8gpu_h100_bf16_disjoint_mosaic_config() -> "ConfigContainer":
    """LLaVA-1.5-7B with vision on GPUs of its own, as Bridge's own loop can run it."""
    return config_of("llava_15_7b_sft_8gpu_h100_bf16_disjoint")


def qwen25_vl_7b_pretrain_16gpu_h100_bf16_mosaic_config() -> "ConfigContainer":
    """Qwen2.5-VL-7B, all of it trainable."""
    return config_of("qwen25_vl_7b_pretrain_16gpu_h100_bf16")


def qwen3_vl_30b_a3b_pretrain_32gpu_h100_bf16_mosaic_config() -> "ConfigContainer":
    """Qwen3-VL-30B-A3B, all of it trainable."""
    return config_of("qwen3_vl_30b_a3b_pretrain_32gpu_h100_bf16")


def siglip_whisper_mistral_7b_pretrain_16gpu_h100_bf16_mosaic_config() -> "ConfigContainer":
    """Audio, images and text: projectors from Whisper and SigLIP to a frozen Mistral-7B."""
    return config_of("siglip_whisper_mistral_7b_pretrain_16gpu_h100_bf16")


def clip_vit_l_14_pretrain_8gpu_h200_bf16_mosaic_config() -> "ConfigContainer":
    """CLIP ViT-L/14: two towers; the forward step computes the contrastive loss."""
    return config_of("clip_vit_l_14_pretrain_8gpu_h200_bf16")
