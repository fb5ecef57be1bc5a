"""Language models of Hugging Face's config files, in the words of model files."""

from collections.abc import Callable, Mapping
from typing import Any

from megatron_mosaic.errors import LayoutError, PlanError
from megatron_mosaic.fields import names, nearest, show, text
from megatron_mosaic.model.huggingface_keys import (
    Config,
    depth,
    flag,
    numbers,
    size,
    whole,
    with_defaults,
)

Module = dict[str, Any]


def language_module(config: Config) -> Module:
    """Translates the config of a language model.

    Args:
        config: Keys of ``config.json``, or of its ``text_config``.

    Returns:
        A module of a model file, without its tokens.

    Raises:
        PlanError: The kind of model is not supported, or a key is missing.
    """
    kind = config.get("model_type")
    translate = LANGUAGE_KINDS.get(kind) if isinstance(kind, str) else None
    if translate is None:
        known = sorted(LANGUAGE_KINDS)
        raise PlanError(
            f"model_type={show(kind)} must be one of {', '.join(known)} for a language model; "
            f"{nearest(kind, known, otherwise='write a model file by hand')}"
        )
    return translate(with_defaults(config))


def _frame(config: Config, layers: Module, *, mtp: int = 0) -> Module:
    vocab_size = size(config, "vocab_size")
    head: Module = {"vocab_size": vocab_size}
    if flag(config, "tie_word_embeddings"):
        head["share_embeddings_and_output_weights"] = True
    if mtp:
        head["mtp_num_layers"] = mtp
    return {
        "hidden_size": size(config, "hidden_size"),
        **layers,
        "embedding": {"vocab_size": vocab_size},
        "head": head,
    }


def _attention(config: Config, *, qkv_bias: bool = False, qk_norm: bool = False) -> Module:
    heads = size(config, "num_attention_heads")
    attention: Module = {
        "num_attention_heads": heads,
        "num_query_groups": size(config, "num_key_value_heads", heads),
        "add_bias_linear": flag(config, "attention_bias"),
        "add_qkv_bias": qkv_bias,
        "qk_layernorm": qk_norm,
    }
    if config.get("head_dim") is not None:
        attention["kv_channels"] = size(config, "head_dim")
    return attention


def _mlp(config: Config) -> Module:
    return {
        "ffn_hidden_size": size(config, "intermediate_size"),
        "gated_linear_unit": True,
        "mlp_bias": flag(config, "mlp_bias"),
    }


def _experts(config: Config, *, number: str, ffn: str) -> Module:
    return {
        "num_moe_experts": size(config, number),
        "moe_router_topk": size(config, "num_experts_per_tok"),
        "moe_ffn_hidden_size": size(config, ffn),
        "gated_linear_unit": True,
        "mlp_bias": False,
    }


def _windows(config: Config) -> list[int | None]:
    """Window of each layer; a config names the kinds of its layers, or has one for all."""
    count = depth(config)
    window = config.get("sliding_window")
    if window is None or not flag(config, "use_sliding_window", default=True):
        return [None] * count
    kinds = _layer_types(config, {"sliding_attention", "full_attention"})
    if kinds is None:
        # Layers of Qwen2 below max_window_layers see everything.
        first = whole(config, "max_window_layers") if "use_sliding_window" in config else 0
        return [size(config, "sliding_window") if i >= first else None for i in range(count)]
    return [size(config, "sliding_window") if k == "sliding_attention" else None for k in kinds]


def _layer_types(config: Config, known: set[str]) -> list[str] | None:
    kinds = config.get("layer_types")
    if kinds is None:
        return None
    count = depth(config)
    if not isinstance(kinds, list) or not all(kind in known for kind in map(str, kinds)):
        raise PlanError(
            f"layer_types={show(kinds)} must be a list of {', '.join(sorted(known))}; "
            f"write a model file by hand"
        )
    if len(kinds) != count:
        raise LayoutError(
            f"layer_types: length={len(kinds)} must be num_hidden_layers={count}; mend one of them"
        )
    return kinds


def _layered(config: Config, attention: Module, mlps: list[tuple[str, Module]]) -> Module:
    """Layers of one kind of attention, with a window and an MLP each."""
    kinds: dict[str, Module] = {}
    order = []
    for window, (name, mlp) in zip(_windows(config), mlps, strict=True):
        kind = f"{name}_window" if window else name
        kinds[kind] = {**mlp, "window_size": window} if window else mlp
        order.append(kind)
    if len(kinds) == 1:
        (only,) = kinds.values()
        return {"num_layers": len(order), **attention, **only}
    return {**attention, "layer_kinds": kinds, "layers": order}


def _dense(
    config: Config, *, qkv_bias: bool = False, qk_norm: bool = False, windows: bool = True
) -> Module:
    config = config if windows else {**config, "sliding_window": None}
    mlps = [("dense", _mlp(config))] * depth(config)
    attention = _attention(config, qkv_bias=qkv_bias, qk_norm=qk_norm)
    return _frame(config, _layered(config, attention, mlps))


def _mixtral(config: Config) -> Module:
    experts = _experts(config, number="num_local_experts", ffn="intermediate_size")
    mlps = [("experts", experts)] * depth(config)
    return _frame(config, _layered(config, _attention(config), mlps))


def _gpt_oss(config: Config) -> Module:
    experts = _experts(config, number="num_local_experts", ffn="intermediate_size")
    experts["mlp_bias"] = True
    mlps = [("experts", experts)] * depth(config)
    config = {"attention_bias": True, **config}
    return _frame(config, _layered(config, _attention(config), mlps))


def _qwen_moe(config: Config, *, qkv_bias: bool, qk_norm: bool) -> Module:
    attention = _attention(config, qkv_bias=qkv_bias, qk_norm=qk_norm)
    return _frame(config, _layered(config, attention, _qwen_mlps(config)))


def _qwen_mlps(config: Config) -> list[tuple[str, Module]]:
    experts = _experts(config, number="num_experts", ffn="moe_intermediate_size")
    if whole(config, "shared_expert_intermediate_size"):
        experts["moe_shared_expert_intermediate_size"] = size(
            config, "shared_expert_intermediate_size"
        )
        experts["moe_shared_expert_gate"] = True
    step = size(config, "decoder_sparse_step", 1)
    dense = numbers(config, "mlp_only_layers")
    return [
        ("dense", _mlp(config)) if i in dense or (i + 1) % step else ("experts", experts)
        for i in range(depth(config))
    ]


def _qwen_hybrid(config: Config) -> Module:
    """Qwen3-Next and Qwen3.5: linear attention, and softmax attention in every n-th layer."""
    count = depth(config)
    interval = size(config, "full_attention_interval", 4)
    mixers = _layer_types(config, {"linear_attention", "full_attention"}) or [
        "linear_attention" if (i + 1) % interval else "full_attention" for i in range(count)
    ]
    linear_keys = ("num_key_heads", "num_value_heads", "key_head_dim", "value_head_dim")
    parts = {
        "linear_attention": {f"linear_{key}": size(config, f"linear_{key}") for key in linear_keys}
        | {"linear_conv_kernel_dim": size(config, "linear_conv_kernel_dim", 4)},
        "full_attention": {**_attention(config, qk_norm=True), "attention_output_gate": True},
    }
    mlps = _qwen_mlps(config) if whole(config, "num_experts") else [("dense", _mlp(config))] * count
    order = [f"{mixer}_{name}" for mixer, (name, _) in zip(mixers, mlps, strict=True)]
    kinds = {
        kind: {**parts[mixer], **mlp}
        for kind, mixer, (_, mlp) in zip(order, mixers, mlps, strict=True)
    }
    mtp = whole(config, "mtp_num_hidden_layers")
    return _frame(config, {"layer_kinds": kinds, "layers": order}, mtp=mtp)


def _deepseek(config: Config) -> Module:
    ranks = {key: size(config, key) for key in ("q_lora_rank",) if config.get(key) is not None}
    attention: Module = {
        "num_attention_heads": size(config, "num_attention_heads"),
        **ranks,
        "kv_lora_rank": size(config, "kv_lora_rank"),
        "qk_head_dim": size(config, "qk_nope_head_dim"),
        "qk_pos_emb_head_dim": size(config, "qk_rope_head_dim"),
        "v_head_dim": size(config, "v_head_dim"),
    }
    experts = _experts(config, number="n_routed_experts", ffn="moe_intermediate_size")
    shared = whole(config, "n_shared_experts") * experts["moe_ffn_hidden_size"]
    experts["moe_shared_expert_intermediate_size"] = shared
    first, every = whole(config, "first_k_dense_replace"), size(config, "moe_layer_freq", 1)
    mlps = [
        ("dense", _mlp(config)) if i < first or i % every else ("experts", experts)
        for i in range(depth(config))
    ]
    config = {**config, "sliding_window": None}
    mtp = whole(config, "num_nextn_predict_layers")
    return _frame(config, _layered(config, attention, mlps), mtp=mtp)


def _gpt2(config: Config) -> Module:
    hidden = size(config, "n_embd")
    vocab_size = size(config, "vocab_size")
    return {
        "hidden_size": hidden,
        "num_layers": size(config, "n_layer"),
        "num_attention_heads": size(config, "n_head"),
        "ffn_hidden_size": size(config, "n_inner", 4 * hidden),
        "gated_linear_unit": False,
        "add_bias_linear": True,
        "normalization": "LayerNorm",
        "embedding": {"vocab_size": vocab_size, "learned_positions": size(config, "n_positions")},
        "head": {
            "vocab_size": vocab_size,
            "share_embeddings_and_output_weights": flag(config, "tie_word_embeddings"),
        },
    }


def _hybrid_pattern(config: Config) -> str:
    """Letters of the layers; newer configs spell them out."""
    blocks = config.get("layers_block_type")
    if blocks is None:
        return text("hybrid_override_pattern", config.get("hybrid_override_pattern"))
    letters = {"mamba": "M", "attention": "*", "mlp": "-", "moe": "E"}
    return "".join(letters.get(block, "?") for block in names("layers_block_type", blocks))


def _nemotron_h(config: Config) -> Module:
    """Nemotron-H and Nemotron 3, which have a mixer or an MLP in a layer, by their pattern."""
    pattern = _hybrid_pattern(config)
    heads = {"head_dim": config.get("attention_head_dim"), **config}
    plain = {"gated_linear_unit": False, "mlp_bias": flag(config, "mlp_bias")}
    kinds: Mapping[str, Callable[[], Module]] = {
        "M": lambda: {
            "mamba_num_heads": size(config, "mamba_num_heads"),
            "mamba_head_dim": size(config, "mamba_head_dim"),
            "mamba_state_dim": size(config, "ssm_state_size"),
            "mamba_num_groups": size(config, "n_groups"),
            "mamba_conv_kernel_dim": size(config, "conv_kernel", 4),
        },
        "*": lambda: _attention(heads),
        "-": lambda: {"ffn_hidden_size": size(config, "intermediate_size"), **plain},
        "E": lambda: {
            **_experts(config, number="n_routed_experts", ffn="moe_intermediate_size"),
            "moe_shared_expert_intermediate_size": whole(config, "n_shared_experts")
            * whole(config, "moe_shared_expert_intermediate_size"),
            **({"moe_latent_size": size(config, "moe_latent_size")} if _latent(config) else {}),
            **plain,
        },
    }
    unknown = sorted(set(pattern) - set(kinds))
    if unknown:
        raise PlanError(
            f"hybrid_override_pattern: layer={show(unknown[0])} must be one of {' '.join(kinds)}; "
            f"write a model file by hand"
        )
    layers = {letter: kinds[letter]() for letter in dict.fromkeys(pattern)}
    mtp = whole(config, "num_nextn_predict_layers")
    return _frame(config, {"layer_kinds": layers, "layers": pattern}, mtp=mtp)


def _latent(config: Config) -> bool:
    return config.get("moe_latent_size") is not None


def _qwen2(config: Config) -> Module:
    return _dense({"use_sliding_window": False, **config}, qkv_bias=True)


def _qwen3(config: Config) -> Module:
    return _dense({"use_sliding_window": False, **config}, qk_norm=True)


def _qwen2_moe(config: Config) -> Module:
    return _qwen_moe({"use_sliding_window": False, **config}, qkv_bias=True, qk_norm=False)


def _qwen3_moe(config: Config) -> Module:
    return _qwen_moe({"use_sliding_window": False, **config}, qkv_bias=False, qk_norm=True)


LANGUAGE_KINDS: Mapping[str, Callable[[Config], Module]] = {
    "deepseek_v2": _deepseek,
    "deepseek_v3": _deepseek,
    "gpt2": _gpt2,
    "gpt_oss": _gpt_oss,
    "internlm2": _dense,
    "kimi_k2": _deepseek,
    "llama": _dense,
    "mistral": _dense,
    "mixtral": _mixtral,
    "nemotron_h": _nemotron_h,
    "qwen2": _qwen2,
    "qwen2_5_vl_text": _qwen2,
    "qwen2_moe": _qwen2_moe,
    "qwen3": _qwen3,
    "qwen3_5_moe_text": _qwen_hybrid,
    "qwen3_5_text": _qwen_hybrid,
    "qwen3_moe": _qwen3_moe,
    "qwen3_next": _qwen_hybrid,
    "qwen3_vl_moe_text": _qwen3_moe,
    "qwen3_vl_text": _qwen3,
}
"""Translators by ``model_type``."""
