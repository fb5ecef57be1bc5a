"""Reads single keys of Hugging Face's config files, of which many leave out what is usual."""

from collections.abc import Mapping
from typing import Any

from megatron_mosaic.errors import PlanError
from megatron_mosaic.fields import boolean, count, integers, layer_count, nearest, positive

Config = Mapping[str, Any]

# What configuration classes of transformers fill in; configs leave out what equals it.
# Source: https://huggingface.co/docs/transformers, page of each model, `...Config` parameters.
_LLAMA = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "intermediate_size": 11008,
    "vocab_size": 32000,
}
DEFAULTS: Mapping[str, Config] = {
    "llama": _LLAMA,
    "mistral": {**_LLAMA, "num_key_value_heads": 8, "intermediate_size": 14336},
    "mixtral": {
        **_LLAMA,
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
    "gpt2": {
        "vocab_size": 50257,
        "n_positions": 1024,
        "n_embd": 768,
        "n_layer": 12,
        "n_head": 12,
        "tie_word_embeddings": True,
    },
    "clip_vision_model": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_channels": 3,
        "image_size": 224,
        "patch_size": 32,
    },
    "siglip_vision_model": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_channels": 3,
        "image_size": 224,
        "patch_size": 16,
    },
}


def with_defaults(config: Config) -> Config:
    """Adds what the configuration class of the config's ``model_type`` fills in."""
    return {**DEFAULTS.get(str(config.get("model_type")), {}), **config}


def size(config: Config, key: str, default: int | None = None) -> int:
    """Reads a positive number; null and nothing are the default.

    Raises:
        PlanError: It is none, or is missing where there is no default.
    """
    value = config.get(key)
    if value is None and default is None:
        kind = config.get("model_type", "unknown")
        raise PlanError(
            f"{key} must be given in a config of model_type={kind}; "
            f"{nearest(key, config, otherwise='take the config.json of the published weights')}"
        )
    return positive(key, default if value is None else value)


def depth(config: Config, key: str = "num_hidden_layers") -> int:
    """Reads a number of layers."""
    return layer_count(key, size(config, key))


def one_size(config: Config, key: str) -> int:
    """Reads a number that some configs write once for each side, as ``[448, 448]``."""
    value = config.get(key)
    if isinstance(value, list) and value and all(side == value[0] for side in value):
        return positive(key, value[0])
    return size(config, key)


def whole(config: Config, key: str) -> int:
    """Reads a number that may be 0; null and nothing are."""
    value = config.get(key)
    return 0 if value is None else count(key, value)


def numbers(config: Config, key: str, default: tuple[int, ...] = ()) -> set[int]:
    """Reads a list of layers; null and nothing are the default."""
    value = config.get(key)
    return set(default if value is None else integers(key, value))


def flag(config: Config, key: str, *, default: bool = False) -> bool:
    """Reads true or false; null and nothing are the default."""
    value = config.get(key)
    return default if value is None else boolean(key, value)


def section(config: Config, key: str) -> Config:
    """Reads a part of a config, such as ``vision_config``.

    Raises:
        PlanError: It is missing, or no mapping.
    """
    value = config.get(key)
    if not isinstance(value, dict):
        kind = config.get("model_type", "unknown")
        raise PlanError(
            f"{key} must be a mapping in a config of model_type={kind}; "
            f"take the config.json of weights that transformers itself can load"
        )
    return with_defaults(value)
