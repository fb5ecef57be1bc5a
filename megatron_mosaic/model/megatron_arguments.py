"""Megatron's command line to a ``ModelSpec``, for a language model or ``pretrain_vlm.py``.

Only what says how large the model is gets read; parallel sizes, data and the rest are skipped.
"""

import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_mosaic.errors import LayoutError, PlanError
from megatron_mosaic.fields import layer_count, nearest, positive, read_text, show
from megatron_mosaic.model.megatron_patterns import hybrid_pattern, layer_flags, window
from megatron_mosaic.model.model_file import FORMAT, model_from_document
from megatron_mosaic.model.spec import ModelSpec

Arguments = Mapping[str, str | None]
Module = dict[str, Any]


def read_megatron_arguments(path: str | Path) -> ModelSpec:
    """Reads a file with a Megatron command line, which may have comments and broken lines.

    Raises:
        PlanError: There is no such file, or an argument is missing or mistyped.
        LayoutError: Numbers contradict each other.
    """
    source = read_text(path).replace("\\\n", " ")
    try:
        tokens = shlex.split(source, comments=True)
        return parse_megatron_arguments(tokens, name=Path(path).stem)
    except (PlanError, LayoutError) as error:
        raise type(error)(f"{path}: {error}") from None
    except ValueError as error:
        # shlex: a quotation that does not end.
        raise PlanError(f"{path}: text must be a command line ({error}); close the quote") from None


def parse_megatron_arguments(line: str | Sequence[str], *, name: str = "megatron") -> ModelSpec:
    """Reads the model that a Megatron command line describes.

    Args:
        line: All arguments, as one text or split. With ``--encoder-num-layers`` they are those
            of ``pretrain_vlm.py``, which builds a CLIP tower in the language model's sizes.
        name: Of the model.

    Raises:
        PlanError: An argument is missing or mistyped.
        LayoutError: Numbers contradict each other.

    Source:
        megatron/training/arguments.py and pretrain_vlm.py of Megatron-LM core_v0.19.0.
    """
    given = _split(shlex.split(line) if isinstance(line, str) else line)
    language = _language(given)
    document: dict[str, Any] = {"format": FORMAT, "name": name, "precision": _precision(given)}
    modules = {"language": language}
    if "--encoder-num-layers" in given:
        vision = _vision(given, language)
        rows = vision["tokens_per_item"]
        if "--disable-vision-class-token" not in given:
            # The script keeps the row of the class token, and takes it into the sequence.
            vision["tokens_per_item"] = rows = rows + 1
            vision["patches"]["extra_tokens"] = 0
            vision["patches"]["learned_positions"] += 1
        language["seq_length"] += rows
        if "learned_positions" in language["embedding"]:
            positions = language["embedding"]["learned_positions"]
            language["embedding"]["learned_positions"] = max(positions, language["seq_length"])
        document["edges"] = [["vision", "language"]]
        modules = {"vision": vision, **modules}
    return model_from_document({**document, "modules": modules})


def _split(tokens: Sequence[str]) -> Arguments:
    """Pairs names with what follows them; the last one counts where a name stands twice."""
    given: dict[str, str | None] = {}
    name = None
    for token in tokens:
        if token.startswith("--"):
            name, equals, value = token.partition("=")
            given[name] = value if equals else None
        elif name is not None:
            given[name] = token if given[name] is None else f"{given[name]} {token}"
    return given


def _size(given: Arguments, name: str, default: int | None = None) -> int:
    value = given.get(name)
    if value is None and default is not None:
        return default
    if value is None:
        advice = nearest(name, given, otherwise=f"add {name} with a number")
        raise PlanError(f"{name} must be given with a number; {advice}")
    try:
        return positive(name, int(value))
    except ValueError as error:
        if isinstance(error, PlanError):
            raise
        raise PlanError(f"{name}={show(value)} must be an integer; write a number") from None


def _language(given: Arguments) -> Module:
    hidden = _size(given, "--hidden-size")
    vocab_size = _vocab_size(given)
    sequence = _size(given, "--dataloader-seq-length", _size(given, "--seq-length", -1))
    if sequence < 1:
        raise PlanError("--seq-length must be given with a number; add --seq-length 4096")
    embedding = {"vocab_size": vocab_size}
    if (given.get("--position-embedding-type") or "learned_absolute") == "learned_absolute":
        embedding["learned_positions"] = _size(given, "--max-position-embeddings", sequence)
    layers, mtp = _layers(given)
    tied = "--untie-embeddings-and-output-weights" not in given
    return {
        "hidden_size": hidden,
        "normalization": given.get("--normalization") or "LayerNorm",
        **_shared(given),
        **layers,
        "embedding": embedding,
        "head": {
            "vocab_size": vocab_size,
            "share_embeddings_and_output_weights": tied,
            "mtp_num_layers": mtp,
        },
        "seq_length": sequence,
        **({"trainable": []} if "--freeze-LM" in given else {}),
    }


def _vocab_size(given: Arguments) -> int:
    for name in ("--vocab-size", "--padded-vocab-size"):
        if given.get(name) is not None:
            return _size(given, name)
    raise PlanError(
        "--vocab-size must be given with a number, as a tokenizer is not read; add --vocab-size"
    )


def _shared(given: Arguments) -> Module:
    return {
        "gated_linear_unit": "--swiglu" in given or "--gated-linear-unit" in given,
        "add_bias_linear": "--disable-bias-linear" not in given,
    }


def _layers(given: Arguments) -> tuple[Module, int]:
    mtp = _size(given, "--mtp-num-layers", 0)
    for name in ("--hybrid-layer-pattern", "--hybrid-override-pattern"):
        pattern = given.get(name)
        if pattern is not None:
            letters, depth = hybrid_pattern(name, pattern, known="".join(_HYBRID))
            kinds = {letter: _HYBRID[letter](given) for letter in dict.fromkeys(letters)}
            return {"layer_kinds": kinds, "layers": letters}, mtp or depth
    count = _size(given, "--decoder-num-layers", _size(given, "--num-layers", -1))
    if count < 1:
        raise PlanError("--num-layers must be given with a number; add --num-layers 32")
    layer_count("--num-layers", count)
    mixers, mlps = _mixers(given, count), _mlps(given, count)
    order = [f"{mixer}_{mlp}" for mixer, mlp in zip(mixers, mlps, strict=True)]
    kinds = {kind: {**_PARTS[a](given), **_PARTS[b](given)} for kind, a, b in _pairs(mixers, mlps)}
    if len(kinds) == 1:
        return {"num_layers": count, **next(iter(kinds.values()))}, mtp
    return {"layer_kinds": kinds, "layers": order}, mtp


def _pairs(mixers: Sequence[str], mlps: Sequence[str]) -> list[tuple[str, str, str]]:
    both = dict.fromkeys(zip(mixers, mlps, strict=True))
    return [(f"{mixer}_{mlp}", mixer, mlp) for mixer, mlp in both]


def _mixers(given: Arguments, count: int) -> list[str]:
    plain = "latent" if "--multi-latent-attention" in given else "attention"
    if given.get("--linear-attention-freq") is not None:
        flags = layer_flags(given, "--linear-attention-freq", count, every_last=False)
        return ["linear" if flag else plain for flag in flags]
    if given.get("--window-size") is not None:
        # Without a frequency every layer has the window.
        flags = layer_flags(given, "--window-attn-skip-freq", count, every_last=False)
        return ["window" if flag else plain for flag in flags]
    return [plain] * count


def _mlps(given: Arguments, count: int) -> list[str]:
    if given.get("--num-experts") is None:
        return ["mlp"] * count
    flags = layer_flags(given, "--moe-layer-freq", count, every_last=True)
    return ["experts" if flag else "mlp" for flag in flags]


def _attention(given: Arguments) -> Module:
    attention: Module = {
        "num_attention_heads": _size(given, "--num-attention-heads"),
        "add_qkv_bias": "--add-qkv-bias" in given,
        "qk_layernorm": "--qk-layernorm" in given,
        "attention_output_gate": "--attention-output-gate" in given,
    }
    if "--group-query-attention" in given or given.get("--num-query-groups") is not None:
        attention["num_query_groups"] = _size(given, "--num-query-groups", 1)
    if given.get("--kv-channels") is not None:
        attention["kv_channels"] = _size(given, "--kv-channels")
    return attention


def _window_attention(given: Arguments) -> Module:
    seen = window("--window-size", given.get("--window-size") or "")
    return _attention(given) | ({} if seen is None else {"window_size": seen})


def _latent_attention(given: Arguments) -> Module:
    ranks = {}
    if given.get("--q-lora-rank") not in (None, "None"):
        ranks["q_lora_rank"] = _size(given, "--q-lora-rank")
    return {
        "num_attention_heads": _size(given, "--num-attention-heads"),
        **ranks,
        "kv_lora_rank": _size(given, "--kv-lora-rank", 512),
        "qk_head_dim": _size(given, "--qk-head-dim", 128),
        "qk_pos_emb_head_dim": _size(given, "--qk-pos-emb-head-dim", 64),
        "v_head_dim": _size(given, "--v-head-dim", 128),
    }


def _linear_attention(given: Arguments) -> Module:
    return {
        "linear_num_key_heads": _size(given, "--linear-num-key-heads", 16),
        "linear_num_value_heads": _size(given, "--linear-num-value-heads", 32),
        "linear_key_head_dim": _size(given, "--linear-key-head-dim", 128),
        "linear_value_head_dim": _size(given, "--linear-value-head-dim", 128),
        "linear_conv_kernel_dim": _size(given, "--linear-conv-kernel-dim", 4),
    }


def _mamba(given: Arguments) -> Module:
    head_dim = _size(given, "--mamba-head-dim", 64)
    # Megatron's mixer is twice as wide as a token unless it is told its heads.
    heads = _size(given, "--mamba-num-heads", 2 * _size(given, "--hidden-size") // head_dim)
    return {
        "mamba_num_heads": heads,
        "mamba_head_dim": head_dim,
        "mamba_state_dim": _size(given, "--mamba-state-dim", 128),
        "mamba_num_groups": _size(given, "--mamba-num-groups", 8),
    }


def _ffn(given: Arguments) -> int:
    hidden = _size(given, "--hidden-size")
    usual = int((4 * hidden * 2 / 3) / 64) * 64 if "--swiglu" in given else 4 * hidden
    return _size(given, "--ffn-hidden-size", usual)


def _mlp(given: Arguments) -> Module:
    return {"ffn_hidden_size": _ffn(given)}


def _experts(given: Arguments) -> Module:
    experts: Module = {
        "num_moe_experts": _size(given, "--num-experts"),
        "moe_router_topk": _size(given, "--moe-router-topk", 2),
        "moe_ffn_hidden_size": _size(given, "--moe-ffn-hidden-size", _ffn(given)),
        "moe_shared_expert_gate": "--moe-shared-expert-gate" in given,
    }
    for name in ("--moe-shared-expert-intermediate-size", "--moe-latent-size"):
        if given.get(name) is not None:
            experts[name.removeprefix("--").replace("-", "_")] = _size(given, name)
    return experts


_PARTS: Mapping[str, Callable[[Arguments], Module]] = {
    "attention": _attention,
    "window": _window_attention,
    "latent": _latent_attention,
    "linear": _linear_attention,
    "mlp": _mlp,
    "experts": _experts,
}
# Letters of Megatron's hybrid patterns: core/models/hybrid/hybrid_layer_allocation.py.
_HYBRID: Mapping[str, Callable[[Arguments], Module]] = {
    "M": _mamba,
    "G": _linear_attention,
    "*": _attention,
    "+": _latent_attention,
    "-": _mlp,
    "E": _experts,
}


def _vision(given: Arguments, language: Module) -> Module:
    """The tower of ``pretrain_vlm.py``: CLIP's, in the sizes of the language model."""
    patch = _size(given, "--patch-dim", 16)
    tokens = (_size(given, "--img-h", 224) // patch) * (_size(given, "--img-w", 224) // patch)
    hidden = language["hidden_size"]
    return {
        "hidden_size": hidden,
        "num_layers": _size(given, "--encoder-num-layers"),
        "normalization": language["normalization"],
        "final_layernorm": False,
        **_shared(given),
        **_attention(given),
        **_mlp(given),
        "patches": {
            "values": _size(given, "--num-channels", 3) * patch**2,
            "learned_positions": tokens + 1,
            "extra_tokens": 1,
            "normed": True,
        },
        "projector": {
            "sizes": [hidden, _ffn(given), hidden],
            "add_bias_linear": "--disable-bias-linear" not in given,
        },
        "tokens_per_item": tokens,
        **({"trainable": ["projector"]} if "--freeze-ViT" in given else {}),
    }


def _precision(given: Arguments) -> str:
    if given.get("--fp4-format") is not None:
        return "nvfp4"
    if given.get("--fp8-format") is not None or given.get("--fp8-recipe") is not None:
        return "mxfp8" if given.get("--fp8-recipe") == "mxfp8" else "fp8"
    return "bf16" if "--bf16" in given else "fp16" if "--fp16" in given else "fp32"
