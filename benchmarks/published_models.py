"""Geometry of the models of the published points, by the names that the sources give them."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache

from megatron_mosaic.model.layers import Layer, Mlp, SelfAttention, StateSpace
from megatron_mosaic.model.shipped import load_model
from megatron_mosaic.model.spec import (
    LanguageHead,
    LayerRun,
    ModelSpec,
    ModuleSpec,
    TokenEmbedding,
)
from megatron_mosaic.model.tokens import Distribution

_load = cache(load_model)

# Beginnings of names in the points file, in lower case, and the shipped models that they mean.
_SHIPPED = {
    "llama3-8b": "llama-3-8b",
    "llama3_8b": "llama-3-8b",
    "llama3 8b": "llama-3-8b",
    "llama3_70b": "llama-3-70b",
    "llama3 70b": "llama-3-70b",
    "llama3.1_405b": "llama-3.1-405b",
    "llama3_405b": "llama-3.1-405b",
    "llama2-7b": "llama-2-7b",
    "qwen2.5 32b": "qwen2.5-32b",
    "deepseekv3": "deepseek-v3",
    "deepseek-v3": "deepseek-v3",
    "deepseek v3": "deepseek-v3",
    "deepseekv2": "deepseek-v2",
    "kimi_k2": "kimi-k2",
    "kimi k2": "kimi-k2",
    "kimi-k2": "kimi-k2",
    "moonlight-16b": "moonlight-16b-a3b",
    "gpt oss 120b": "gpt-oss-120b",
    "gpt-oss-120b": "gpt-oss-120b",
    "gpt-oss 120b": "gpt-oss-120b",
    "gpt oss 20b": "gpt-oss-20b",
    "gpt-oss 20b": "gpt-oss-20b",
    "gpt-oss-20b": "gpt-oss-20b",
    "qwen3_30b_a3b": "qwen3-30b-a3b",
    "qwen3-30b-a3b": "qwen3-30b-a3b",
    "qwen3 moe 30b": "qwen3-30b-a3b",
    "qwen3_235b_a22b": "qwen3-235b-a22b",
    "qwen3-235b-a22b": "qwen3-235b-a22b",
    "qwen3_next_80b": "qwen3-next-80b-a3b",
    "qwen3-next": "qwen3-next-80b-a3b",
    "qwen3 next": "qwen3-next-80b-a3b",
    "qwen3-8b": "qwen3-8b",
    "qwen3_8b": "qwen3-8b",
    "qwen3_32b": "qwen3-32b",
    "qwen3-32b": "qwen3-32b",
    "qwen3_vl_30b_a3b": "qwen3-vl-30b-a3b",
    "qwen3-vl-30b-a3b": "qwen3-vl-30b-a3b",
    "qwen3.6-vl-35b-a3b": "qwen3.6-35b-a3b",
    "qwen3.5-vl-35b-a3b": "qwen3.6-35b-a3b",
    "qwen35_vl_35b_a3b": "qwen3.6-35b-a3b",
    "qwen3.8-vl-27b": "qwen3.8-27b",
    "qwen3.5-vl-27b": "qwen3.5-27b",
    "gemma4-vl-26b": "gemma-4-26b-a4b",
    "nemotron_3_nano": "nemotron-3-nano-30b-a3b",
    "nemotron-3-nano-30b": "nemotron-3-nano-30b-a3b",
    "nemotron_3_super": "nemotron-3-super-120b-a12b",
    "nemotron-3-super": "nemotron-3-super-120b-a12b",
    "nemotron v3 super": "nemotron-3-super-120b-a12b",
    "mixtral 8x7b": "mixtral-8x7b",
    "mixtral_8x7b": "mixtral-8x7b",
    "mixtral 8x22b": "mixtral-8x22b",
    "mixtral_8x22b": "mixtral-8x22b",
    "gpt 22b": "gpt-22b",
    "gpt 175b": "gpt-175b",
    "gpt 530b": "gpt-530b",
    "gpt 1t": "gpt-1t",
    "gpt3_175b": "gpt-3-175b",
    "gpt3 175b": "gpt-3-175b",
}


def published_models() -> Mapping[str, Callable[[], ModelSpec]]:
    """Makers of models by the beginning of the names that the points file has, in lower case."""
    shipped: dict[str, Callable[[], ModelSpec]] = {
        start: lambda name=name: _load(name) for start, name in _SHIPPED.items()
    }
    return {
        **shipped,
        # SimuMax's scripts cut models to a few layers, DeepSeeks to one dense and three of
        # experts, and give the largest Llama 16 groups where its paper has 8.
        "llama3-70b 12 layers": lambda: _cut(_load("llama-3-70b"), (12,)),
        "llama3-405b 4 layers": lambda: _with_groups(_cut(_load("llama-3.1-405b"), (4,)), 16),
        "deepseekv2 4 layers": lambda: _cut(_load("deepseek-v2"), (1, 3)),
        "deepseekv3 4 layers": lambda: _without_mtp(_cut(_load("deepseek-v3"), (1, 3))),
        "deepseekv3 (w/o mtp)": lambda: _without_mtp(_load("deepseek-v3")),
        "nemotronh_56b": _nemotron_h_56b,
        "nemotron-h 56b": _nemotron_h_56b,
    }


def with_sequence(model: ModelSpec, length: int) -> ModelSpec:
    """The same model with sequences of another length."""
    return _with_language(model, tokens_per_item=Distribution.constant(float(length)))


def _with_language(model: ModelSpec, **changes: object) -> ModelSpec:
    language = replace(model.language, **changes)  # pyright: ignore[reportArgumentType]
    return replace(model, modules={**model.modules, "language": language})


def _cut(model: ModelSpec, counts: tuple[int, ...]) -> ModelSpec:
    runs = zip(counts, model.language.layers, strict=True)
    return _with_language(model, layers=tuple(LayerRun(count, run.layer) for count, run in runs))


def _with_groups(model: ModelSpec, num_groups: int) -> ModelSpec:
    changed = []
    for count, layer in model.language.layers:
        assert isinstance(layer.mixer, SelfAttention)
        mixer = replace(layer.mixer, num_query_groups=num_groups)
        changed.append(LayerRun(count, replace(layer, mixer=mixer)))
    return _with_language(model, layers=tuple(changed))


def _without_mtp(model: ModelSpec) -> ModelSpec:
    head = model.language.output
    assert isinstance(head, LanguageHead)
    return _with_language(model, output=replace(head, mtp_layers=0))


def _nemotron_h_56b() -> ModelSpec:
    # arXiv 2504.03624, table 1: 54 Mamba-2, 54 MLP and 10 attention layers, evenly dispersed.
    mamba = StateSpace(num_heads=256, head_dim=64, state_size=256, num_groups=8)
    kinds = {
        "M": Layer(mixer=mamba, mlp=None),
        "*": Layer(mixer=SelfAttention(num_heads=64, num_query_groups=8, head_dim=128), mlp=None),
        "-": Layer(mixer=None, mlp=Mlp(ffn_hidden_size=32768, gated=False)),
    }
    pattern = ("M-M-M-M*-" + "M-M-M-M-M*-" * 9 + "M-M-M-M-M-")[:118]
    language = ModuleSpec(
        name="language",
        hidden_size=8192,
        layers=tuple(LayerRun(1, kinds[letter]) for letter in pattern),
        causal=True,
        input=TokenEmbedding(vocab_size=131072),
        output=LanguageHead(vocab_size=131072),
        items_per_sample=Distribution.constant(1.0),
        tokens_per_item=Distribution.constant(8192.0),
    )
    return ModelSpec(name="nemotron-h-56b", modules={"language": language})
