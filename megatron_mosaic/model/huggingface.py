"""Hugging Face's ``config.json`` to a ``ModelSpec``."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from megatron_mosaic.errors import LayoutError, PlanError
from megatron_mosaic.fields import mapping, nearest, number, read_text, show
from megatron_mosaic.model.huggingface_keys import (
    Config,
    depth,
    flag,
    numbers,
    one_size,
    section,
    size,
)
from megatron_mosaic.model.huggingface_language import LANGUAGE_KINDS, Module, language_module
from megatron_mosaic.model.model_file import FORMAT, model_from_document
from megatron_mosaic.model.spec import ModelSpec

_PRECISIONS = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


def read_huggingface(
    path: str | Path, *, name: str | None = None, seq_length: int = 4096, image_tokens: int = 1024
) -> ModelSpec:
    """Reads a model from a ``config.json``, or from the folder that holds it.

    Args:
        path: File or folder.
        name: Of the model; the folder's if none is given.
        seq_length: Tokens of a sample in the language model.
        image_tokens: Pieces of an image where the model takes images of any size; others have
            what their config says. Every sample has one image.

    Raises:
        PlanError: There is no such file, it is no JSON, its kind of model is not supported, or
            it lacks a key.
        LayoutError: Its numbers contradict each other.
    """
    file = Path(path) / "config.json" if Path(path).is_dir() else Path(path)
    try:
        config = mapping("config", _parse_json(read_text(file)))
        document = huggingface_document(
            config,
            name=name or file.absolute().parent.name,
            seq_length=seq_length,
            image_tokens=image_tokens,
        )
        return model_from_document(document)
    except (PlanError, LayoutError) as error:
        raise type(error)(f"{file}: {str(error).removeprefix(f'{file}: ')}") from None


def _parse_json(source: str) -> Any:
    try:
        return json.loads(source)
    except json.JSONDecodeError as error:
        raise PlanError(f"line {error.lineno}: text must be JSON ({error.msg}); mend it") from None


def huggingface_document(
    config: Config, *, name: str, seq_length: int, image_tokens: int
) -> dict[str, Any]:
    """Translates a config to what a model file contains; see ``read_huggingface``."""
    kind = config.get("model_type")
    vision = _VISION_KINDS.get(kind) if isinstance(kind, str) else None
    if vision is None and str(kind) not in LANGUAGE_KINDS:
        raise PlanError(
            f"model_type={show(kind)} must be one of {', '.join(SUPPORTED)}; "
            f"{nearest(kind, SUPPORTED, otherwise='write a model file by hand')}"
        )
    text_config = _text_config(config)
    modules = {"language": {**language_module(text_config), "seq_length": seq_length}}
    document: dict[str, Any] = {"format": FORMAT, "name": name}
    if vision is not None:
        tower = vision(config, modules["language"]["hidden_size"])
        modules = {"vision": {"tokens_per_item": image_tokens, **tower}, **modules}
        document["edges"] = [["vision", "language"]]
    stored = text_config.get("dtype") or text_config.get("torch_dtype")
    stored = stored or config.get("dtype") or config.get("torch_dtype")
    return {**document, "precision": _PRECISIONS.get(str(stored), "bf16"), "modules": modules}


def _text_config(config: Config) -> Config:
    """Keys of the language model, which older configs have beside the others."""
    kind = config.get("model_type")
    inner = {"model_type": f"{kind}_text"} if str(kind) in _VISION_KINDS else {}
    for key in ("text_config", "llm_config"):
        if key in config:
            tied = config.get("tie_word_embeddings")
            outer = inner if tied is None else {**inner, "tie_word_embeddings": tied}
            return {**outer, **section(config, key)}
    return {**config, **inner}


def _plain_tower(config: Config, *, layers: str = "num_hidden_layers", heads: str) -> Module:
    return {
        "hidden_size": size(config, "hidden_size"),
        "num_layers": depth(config, layers),
        "num_attention_heads": size(config, heads),
        "ffn_hidden_size": size(config, "intermediate_size"),
        "gated_linear_unit": False,
        "add_bias_linear": True,
        "normalization": "LayerNorm",
    }


def _fixed_images(config: Config, *, class_token: bool) -> Module:
    """Input of a tower that takes images of one size."""
    patch = one_size(config, "patch_size")
    tokens = (one_size(config, "image_size") // patch) ** 2
    return {
        "patches": {
            "values": size(config, "num_channels", 3) * patch**2,
            "learned_positions": tokens + class_token,
            "extra_tokens": int(class_token),
        },
        "tokens_per_item": tokens,
    }


def _layers_used(total: int, layer: object) -> int:
    """Layers that run for the features that are taken after some layer; -1 is the last."""
    used = []
    for it in layer if isinstance(layer, list) else [layer]:
        if not isinstance(it, int) or not -total <= it <= total:
            raise PlanError(
                f"vision_feature_layer={show(it)} must be one of the {total} layers of the tower; "
                f"write one such as -2"
            )
        used.append(it if it >= 0 else total + 1 + it)
    return max(used, default=total)


def _llava(config: Config, out: int) -> Module:
    vision = section(config, "vision_config")
    kind = vision.get("model_type")
    if kind not in ("clip_vision_model", "siglip_vision_model"):
        raise PlanError(
            f"vision_config: model_type={show(kind)} must be clip_vision_model or "
            f"siglip_vision_model; write a model file by hand"
        )
    tower = _plain_tower(vision, heads="num_attention_heads")
    clip = kind == "clip_vision_model"
    inputs = _fixed_images(vision, class_token=clip)
    inputs["patches"] |= {"normed": clip, "add_bias_linear": not clip}
    # The features are taken before the tower's last norm, unless after all of it.
    used = _layers_used(tower["num_layers"], config.get("vision_feature_layer", -2))
    return {
        **tower,
        **inputs,
        "num_layers": used,
        "final_layernorm": False,
        "projector": {
            "sizes": [tower["hidden_size"], out, out],
            "add_bias_linear": flag(config, "multimodal_projector_bias", default=True),
        },
    }


def _qwen_patches(vision: Config) -> int:
    # Older configs say in_chans, and Qwen2.5-VL's leave out what is 2 or 3.
    channels = size(vision, "in_channels", size(vision, "in_chans", 3))
    return channels * size(vision, "temporal_patch_size", 2) * size(vision, "patch_size") ** 2


def _merger(vision: Config, out: int, *, merge: int) -> Module:
    joined = size(vision, "hidden_size") * merge**2
    return {"sizes": [joined, joined, out], "merged_tokens": merge**2}


def _qwen25_vl(config: Config, out: int) -> Module:
    vision = section(config, "vision_config")
    total = depth(vision, "depth")
    full = numbers(vision, "fullatt_block_indexes", (7, 15, 23, 31))
    window = (size(vision, "window_size", 112) // size(vision, "patch_size")) ** 2
    tower = _plain_tower(vision, layers="depth", heads="num_heads")
    del tower["num_layers"]
    kinds = {"near": {"window_size": window}, "far": {}}
    order = ["far" if layer in full else "near" for layer in range(total)]
    return {
        **tower,
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "layer_kinds": {kind: kinds[kind] for kind in dict.fromkeys(order)},
        "layers": order,
        "patches": {"values": _qwen_patches(vision)},
        # The merger begins with the tower's last norm.
        "projector": _merger(vision, out, merge=size(vision, "spatial_merge_size", 2)),
    }


def _qwen3_vl(config: Config, out: int) -> Module:
    # Mergers for the features of middle layers (deepstack) are left out: 3 % of a tower.
    vision = section(config, "vision_config")
    return {
        **_plain_tower(vision, layers="depth", heads="num_heads"),
        "patches": {
            "values": _qwen_patches(vision),
            "learned_positions": size(vision, "num_position_embeddings", 2304),
            "add_bias_linear": True,
        },
        "projector": _merger(vision, out, merge=size(vision, "spatial_merge_size", 2)),
    }


def _internvl(config: Config, out: int) -> Module:
    vision = section(config, "vision_config")
    tower = _plain_tower(vision, heads="num_attention_heads")
    qkv_bias = flag(vision, "qkv_bias", default=flag(vision, "attention_bias", default=True))
    rms = "rms" in str(vision.get("norm_type", "layer_norm")).lower()
    layer = config.get("select_layer", config.get("vision_feature_layer", -1))
    inputs = _fixed_images(vision, class_token=True)
    inputs["patches"]["add_bias_linear"] = True
    ratio = number("downsample_ratio", config.get("downsample_ratio", 0.5))
    if not 0 < ratio <= 1:
        raise PlanError(f"downsample_ratio={ratio:g} must be > 0 and <= 1; write one such as 0.5")
    merge = round(1 / ratio)
    return {
        **tower,
        **inputs,
        "num_layers": _layers_used(tower["num_layers"], layer),
        "add_bias_linear": True,
        "add_qkv_bias": qkv_bias,
        "qk_layernorm": flag(
            vision, "qk_normalization", default=flag(vision, "use_qk_norm", default=False)
        ),
        "normalization": "RMSNorm" if rms else "LayerNorm",
        "final_layernorm": False,
        "projector": {
            "sizes": [tower["hidden_size"] * merge**2, out, out],
            "merged_tokens": merge**2,
        },
    }


_VISION_KINDS: Mapping[str, Callable[[Config, int], Module]] = {
    "internvl": _internvl,
    "internvl_chat": _internvl,
    "llava": _llava,
    "qwen2_5_vl": _qwen25_vl,
    "qwen3_5": _qwen3_vl,
    "qwen3_5_moe": _qwen3_vl,
    "qwen3_vl": _qwen3_vl,
    "qwen3_vl_moe": _qwen3_vl,
}

SUPPORTED = tuple(sorted([*LANGUAGE_KINDS, *_VISION_KINDS]))
"""Values of ``model_type`` that can be read."""
