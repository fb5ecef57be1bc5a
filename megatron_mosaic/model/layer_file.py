"""Layers as model files write them: Megatron's names, kinds of layers, and runs of kinds."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from itertools import groupby
from typing import Any

from megatron_mosaic.errors import LayoutError, PlanError
from megatron_mosaic.fields import (
    Parse,
    boolean,
    count,
    layer_count,
    mapping,
    nearest,
    positive,
    show,
    text,
)
from megatron_mosaic.model.layers import (
    Experts,
    LatentAttention,
    Layer,
    LinearAttention,
    Mlp,
    SelfAttention,
    StateSpace,
)
from megatron_mosaic.model.spec import LayerRun

# Key in the file: field of the dataclass. The first key of each says that the part is there.
_SELF_ATTENTION = {
    "num_attention_heads": "num_heads",
    "num_query_groups": "num_query_groups",
    "kv_channels": "head_dim",
    "window_size": "window",
    "attention_output_gate": "output_gate",
    "add_bias_linear": "bias",
    "add_qkv_bias": "qkv_bias",
    "qk_layernorm": "qk_norm",
}
_LATENT_ATTENTION = {
    "kv_lora_rank": "key_value_rank",
    "num_attention_heads": "num_heads",
    "q_lora_rank": "query_rank",
    "qk_head_dim": "head_dim",
    "qk_pos_emb_head_dim": "rotary_head_dim",
    "v_head_dim": "value_head_dim",
}
_LINEAR_ATTENTION = {
    "linear_num_value_heads": "num_value_heads",
    "linear_num_key_heads": "num_key_heads",
    "linear_key_head_dim": "key_head_dim",
    "linear_value_head_dim": "value_head_dim",
    "linear_conv_kernel_dim": "convolution_width",
}
_STATE_SPACE = {
    "mamba_num_heads": "num_heads",
    "mamba_head_dim": "head_dim",
    "mamba_state_dim": "state_size",
    "mamba_num_groups": "num_groups",
    "mamba_conv_kernel_dim": "convolution_width",
}
_MLP = {
    "ffn_hidden_size": "ffn_hidden_size",
    "gated_linear_unit": "gated",
    "mlp_bias": "bias",
}
_EXPERTS = {
    "num_moe_experts": "num_experts",
    "moe_router_topk": "experts_per_token",
    "moe_ffn_hidden_size": "ffn_hidden_size",
    "moe_shared_expert_intermediate_size": "shared_ffn_hidden_size",
    "gated_linear_unit": "gated",
    "moe_latent_size": "latent_size",
    "moe_shared_expert_gate": "shared_gate",
    "mlp_bias": "bias",
}
# More telling ones first: MLA also has num_attention_heads.
_MIXERS = {
    LatentAttention: _LATENT_ATTENTION,
    LinearAttention: _LINEAR_ATTENTION,
    StateSpace: _STATE_SPACE,
    SelfAttention: _SELF_ATTENTION,
}
_MLPS = {Experts: _EXPERTS, Mlp: _MLP}
_FLAGS = {
    "attention_output_gate",
    "add_bias_linear",
    "add_qkv_bias",
    "qk_layernorm",
    "mlp_bias",
    "moe_shared_expert_gate",
}
_OPTIONAL = {
    *_FLAGS,
    "num_query_groups",
    "kv_channels",
    "window_size",
    "q_lora_rank",
    "linear_conv_kernel_dim",
    "mamba_conv_kernel_dim",
    "moe_shared_expert_intermediate_size",
    "moe_latent_size",
}
_BOOLEANS = {*_FLAGS, "gated_linear_unit"}

LAYER_KEYS: Mapping[str, Parse] = {
    key: boolean
    if key in _BOOLEANS
    else count
    if key == "moe_shared_expert_intermediate_size"
    else positive
    for table in (*_MIXERS.values(), *_MLPS.values())
    for key in (*table, "add_bias_linear")
}
"""Keys of a layer, which may stand in a kind of layer, or in the module for all its kinds."""


def read_layer(where: str, own: Mapping[str, Any], shared: Mapping[str, Any]) -> Layer:
    """Makes a layer of its own keys and those that its module gives to all kinds.

    What a part is (latent or other attention, experts or a dense MLP) its own keys say, if they
    say anything about that part; else the shared ones.

    Raises:
        PlanError: A key is missing, or two parts claim the same place.
        LayoutError: Numbers contradict each other.
    """
    mixer = _part_of(where, _MIXERS, own, shared)
    mlp = _part_of(where, _MLPS, own, shared)
    keys = {**shared, **own}
    return Layer(
        mixer=_fill(where, mixer, keys) if mixer else None,
        mlp=_fill(where, mlp, keys) if mlp else None,
    )


def check_all_used(where: str, keys: Iterable[str], layers: Iterable[Layer]) -> None:
    """Raises for a key that none of the layers has a part for."""
    used = {key for layer in layers for key in _keys_of(layer)}
    for key in keys:
        if key not in used:
            tables = [table for table in (*_MIXERS.values(), *_MLPS.values()) if key in table]
            raise PlanError(
                f"{where}: key={show(key)} must belong to a part that the layer has; remove it, "
                f"or add {' or '.join(next(iter(table)) for table in tables)}"
            )


def _keys_of(layer: Layer) -> set[str]:
    keys = {
        key
        for part in (layer.mixer, layer.mlp)
        if part is not None
        for key in {**_MIXERS, **_MLPS}[type(part)]
    }
    return keys | {"add_bias_linear"} if layer.mlp is not None else keys


def _part_of(
    where: str,
    kinds: Mapping[type, Mapping[str, str]],
    own: Mapping[str, Any],
    shared: Mapping[str, Any],
) -> Any:
    for keys in (own, shared):
        found = [kind for kind, table in kinds.items() if next(iter(table)) in keys]
        if LatentAttention in found and SelfAttention in found:
            found.remove(SelfAttention)
        if len(found) > 1:
            first, second = (next(iter(kinds[kind])) for kind in found[:2])
            raise PlanError(
                f"{where}: {first}={show(keys[first])} must not stand beside "
                f"{second}={show(keys[second])}; write two layer_kinds"
            )
        if found:
            return found[0]
    return None


def _fill(where: str, kind: type, keys: Mapping[str, Any]) -> Any:
    table = {**_MIXERS, **_MLPS}[kind]
    for key in table:
        if key not in keys and key not in _OPTIONAL:
            raise PlanError(
                f"{where}: {key} must be given beside {next(iter(table))}; "
                f"add the line '{key}: {'true' if key in _BOOLEANS else '...'}'"
            )
    values = {field: keys[key] for key, field in table.items() if key in keys}
    if kind is LatentAttention:
        values.setdefault("query_rank", None)
    elif kind is SelfAttention:
        _complete_attention(where, keys, values)
    elif kind in (Mlp, Experts):
        # Megatron has one key for the biases of attention and MLP; mlp_bias tells them apart.
        values.setdefault("bias", keys.get("add_bias_linear", False))
    if kind is Experts and values["experts_per_token"] > values["num_experts"]:
        raise LayoutError(
            f"{where}: moe_router_topk={values['experts_per_token']} must be <= "
            f"num_moe_experts={values['num_experts']}; lower it"
        )
    if kind is LinearAttention:
        _check_multiple(where, keys, "linear_num_value_heads", "linear_num_key_heads")
    if kind is StateSpace:
        _check_multiple(where, keys, "mamba_num_heads", "mamba_num_groups")
    return kind(**values)


def _complete_attention(where: str, keys: Mapping[str, Any], values: dict[str, Any]) -> None:
    values.setdefault("num_query_groups", values["num_heads"])
    if "head_dim" not in values:
        _check_multiple(where, keys, "hidden_size", "num_attention_heads", or_give="kv_channels")
        values["head_dim"] = keys["hidden_size"] // values["num_heads"]
    if values["num_heads"] % values["num_query_groups"]:
        _check_multiple(where, keys, "num_attention_heads", "num_query_groups")


def _check_multiple(
    where: str, keys: Mapping[str, Any], field: str, divisor: str, *, or_give: str | None = None
) -> None:
    if keys[field] % keys[divisor]:
        advice = f"give {or_give}" if or_give else f"change {divisor}"
        raise LayoutError(
            f"{where}: {field}={keys[field]} must be a multiple of {divisor}={keys[divisor]}; "
            f"{advice}"
        )


def read_runs(field: str, written: object, kinds: Mapping[str, Layer]) -> tuple[LayerRun, ...]:
    """Reads the order of the layers.

    Args:
        field: Name of the value in messages.
        written: A list of ``kind``, ``{kind: count}`` and ``{repeat: count, pattern: [...]}``, or
            a string with a kind in each letter, as Megatron's hybrid patterns.
        kinds: Layers by name.

    Returns:
        Runs of equal layers; neighbours differ.
    """
    names = _expand(field, list(written) if isinstance(written, str) else written, kinds)
    return merged_runs([kinds[name] for name in names])


def merged_runs(layers: Sequence[Layer]) -> tuple[LayerRun, ...]:
    """Joins neighbours that are equal."""
    return tuple(LayerRun(len(list(equal)), layer) for layer, equal in groupby(layers))


def _expand(field: str, written: object, kinds: Mapping[str, Layer]) -> list[str]:
    if not isinstance(written, list) or not written:
        raise PlanError(
            f"{field}={show(written)} must be a list of layer kinds; "
            f"write [{', '.join(f'{kind}: 1' for kind in kinds)}]"
        )
    names: list[str] = []
    for index, entry in enumerate(written):
        where = f"{field}[{index}]"
        if isinstance(entry, dict) and set(entry) == {"repeat", "pattern"}:
            pattern = _expand(f"{where}.pattern", entry["pattern"], kinds)
            names += pattern * layer_count(f"{where}.repeat", entry["repeat"])
            layer_count(f"{field}: number", len(names))
            continue
        runs = mapping(where, entry) if isinstance(entry, dict) else {text(where, entry): 1}
        for kind, times in runs.items():
            if kind not in kinds:
                raise PlanError(
                    f"{where}: kind={show(kind)} must be one of {', '.join(kinds)}; "
                    f"{nearest(kind, kinds, otherwise='add it to layer_kinds')}"
                )
            names += [kind] * layer_count(f"{where}.{kind}", times)
    return names


def write_layer(layer: Layer) -> dict[str, Any]:
    """Writes a layer with the keys that ``read_layer`` takes."""
    written: dict[str, Any] = {}
    for part in (layer.mixer, layer.mlp):
        if part is not None:
            table = {**_MIXERS, **_MLPS}[type(part)]
            defaults = {it.name: it.default for it in fields(part)}
            values = {key: getattr(part, field) for key, field in table.items()}
            written |= {
                key: value
                for key, value in values.items()
                if value not in (None, defaults[table[key]])
            }
    if isinstance(layer.mlp, Mlp | Experts):
        written |= {"gated_linear_unit": layer.mlp.gated, "mlp_bias": layer.mlp.bias}
    if written.get("mlp_bias", False) == written.get("add_bias_linear", False):
        written.pop("mlp_bias", None)
    return written


def write_runs(runs: Sequence[LayerRun], names: Mapping[Layer, str]) -> list[Any]:
    """Writes the order of layers; what repeats is written once."""
    entries: list[Any] = [
        names[layer] if times == 1 else {names[layer]: times} for times, layer in runs
    ]
    for period in range(1, len(entries) // 2 + 1):
        times, rest = divmod(len(entries), period)
        if entries[: times * period] == entries[:period] * times:
            return [{"repeat": times, "pattern": entries[:period]}, *entries[len(entries) - rest :]]
    return entries


def describe_kind(layer: Layer) -> str:
    """Names a layer by its parts, such as ``attention_mlp``."""
    return "_".join(
        {
            SelfAttention: "window" if getattr(part, "window", None) else "attention",
            LatentAttention: "latent",
            LinearAttention: "linear",
            StateSpace: "mamba",
            Mlp: "mlp",
            Experts: "experts",
        }[type(part)]
        for part in (layer.mixer, layer.mlp)
        if part is not None
    )
