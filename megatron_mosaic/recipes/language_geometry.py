"""The numbers of a recipe's language model under Megatron's names."""

from typing import Any

from megatron_mosaic.errors import PlanError
from megatron_mosaic.model.layers import Experts, SelfAttention
from megatron_mosaic.model.spec import ModuleSpec, TokenEmbedding
from megatron_mosaic.recipes.catalog import Recipe

_ACTIVATIONS = {True: "--swiglu", False: "--quick-gelu"}


def transformer_sizes(module: ModuleSpec) -> dict[str, Any]:
    """Fields of Megatron's ``TransformerConfig`` that say a module's geometry.

    Raises:
        PlanError: Layers differ, or are not of self-attention.
    """
    layer = module.layers[0].layer
    if len(module.layers) > 1 or not isinstance(layer.mixer, SelfAttention):
        raise PlanError(
            f"recipes: modules.{module.name} must have equal layers of self-attention; "
            f"build the module from a provider of Megatron-Bridge"
        )
    mixer, mlp = layer.mixer, layer.mlp
    sizes: dict[str, Any] = {
        "num_layers": module.num_layers,
        "hidden_size": module.hidden_size,
        "num_attention_heads": mixer.num_heads,
        "num_query_groups": mixer.num_query_groups,
        "kv_channels": mixer.head_dim,
        "add_qkv_bias": mixer.qkv_bias,
        "qk_layernorm": mixer.qk_norm,
        "ffn_hidden_size": mlp.ffn_hidden_size if mlp is not None else None,
        "gated_linear_unit": mlp.gated if mlp is not None else False,
        "add_bias_linear": mlp.bias if mlp is not None else False,
        "normalization": {"rms": "RMSNorm", "layer": "LayerNorm"}[module.norm],
    }
    if isinstance(mlp, Experts):
        sizes |= {
            "num_moe_experts": mlp.num_experts,
            "moe_router_topk": mlp.experts_per_token,
            "moe_ffn_hidden_size": mlp.ffn_hidden_size,
        }
    return sizes


def arguments_of(recipe: Recipe) -> list[str]:
    """Megatron's arguments of a recipe: its language model, its batch and its plan.

    A script such as ``pretrain_vlm.py`` takes them beside those of its data, its optimizer and its
    encoders. Parallel sizes are the plan's to say.
    """
    model, plan = recipe.spec(), recipe.plan()
    sizes = transformer_sizes(model.language)
    options = {
        "--num-layers": sizes["num_layers"],
        "--hidden-size": sizes["hidden_size"],
        "--num-attention-heads": sizes["num_attention_heads"],
        "--kv-channels": sizes["kv_channels"],
        "--ffn-hidden-size": sizes["ffn_hidden_size"],
        "--normalization": sizes["normalization"],
        "--seq-length": model.sequence_length,
        "--max-position-embeddings": model.sequence_length,
        "--micro-batch-size": plan.micro_batch_size,
        "--global-batch-size": plan.global_batch_size,
        **_expert_options(sizes),
    }
    words = [word for option, value in options.items() for word in (option, str(value))]
    if sizes["num_query_groups"] < sizes["num_attention_heads"]:
        words += ["--group-query-attention", "--num-query-groups", str(sizes["num_query_groups"])]
    words += _flags(model.language, sizes)
    return [*words, "--bf16", *_assumed(recipe), "--mosaic-plan", str(recipe.plan_path)]


def _expert_options(sizes: dict[str, Any]) -> dict[str, int]:
    if "num_moe_experts" not in sizes:
        return {}
    return {
        "--num-experts": sizes["num_moe_experts"],
        "--moe-router-topk": sizes["moe_router_topk"],
        "--moe-ffn-hidden-size": sizes["moe_ffn_hidden_size"],
    }


def _flags(language: ModuleSpec, sizes: dict[str, Any]) -> list[str]:
    words = [_ACTIVATIONS[sizes["gated_linear_unit"]]]
    words += [] if sizes["add_bias_linear"] else ["--disable-bias-linear"]
    words += ["--add-qkv-bias"] if sizes["add_qkv_bias"] else []
    words += ["--qk-layernorm"] if sizes["qk_layernorm"] else []
    learned = isinstance(language.input, TokenEmbedding) and language.input.num_positions
    words += ["--position-embedding-type", "learned_absolute" if learned else "rope"]
    tied = getattr(language.output, "tied", False)
    return [*words, *([] if tied else ["--untie-embeddings-and-output-weights"])]


def _assumed(recipe: Recipe) -> list[str]:
    """What the planner's prediction counts on."""
    return [str(argument) for argument in (recipe.plan().inputs or {}).get("arguments", ())]
