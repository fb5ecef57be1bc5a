from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_mosaic.model.layer_file import merged_runs, read_runs, write_runs
from megatron_mosaic.model.layers import (
    Experts,
    LatentAttention,
    Layer,
    LinearAttention,
    Mlp,
    SelfAttention,
    StateSpace,
)
from megatron_mosaic.model.model_file import parse_model, write_model
from megatron_mosaic.model.parameters import module_parameters, mtp_parameters
from megatron_mosaic.model.shipped import load_model, shipped_models
from megatron_mosaic.model.spec import LanguageHead, Patches, Projector, TokenEmbedding
from megatron_mosaic.model.tokens import Distribution

VLM = """
format: 1
name: small
source: [a paper, its code]
precision: fp8
edges: [[vision, language]]
modules:
  vision:
    hidden_size: 64
    num_layers: 2
    num_attention_heads: 4
    ffn_hidden_size: 256
    gated_linear_unit: false
    add_bias_linear: true
    normalization: LayerNorm
    patches: {values: 588, learned_positions: 17, extra_tokens: 1}
    projector: {sizes: [256, 128], merged_tokens: 4}
    items_per_sample: {counts: {0: 1, 2: 3}}
    tokens_per_item: 16
    trainable: [projector, "*lora*"]
    lora_rank: 8
  language:
    hidden_size: 128
    num_attention_heads: 8
    num_query_groups: 2
    gated_linear_unit: true
    layer_kinds:
      dense: {ffn_hidden_size: 512}
      moe: {num_moe_experts: 4, moe_router_topk: 2, moe_ffn_hidden_size: 64}
    layers: [dense, {repeat: 2, pattern: [moe: 2, dense: 1]}]
    embedding: {vocab_size: 1000}
    head: {vocab_size: 1000, share_embeddings_and_output_weights: true, mtp_num_layers: 1}
    seq_length: 256
    trainable: []
"""

# Totals that authors publish, in billions, and where; without layers that predict further tokens.
PUBLISHED = {
    "clip-vit-l-14": 0.4276,  # https://huggingface.co/openai/clip-vit-large-patch14, its checkpoint
    "deepseek-v2": 236.0,  # arXiv 2405.04434, abstract
    "deepseek-v3": 671.0,  # arXiv 2412.19437, abstract
    "gpt-3-175b": 174.6,  # arXiv 2005.14165, table D.1
    "gpt-22b": 22.0,  # arXiv 2205.05198, table 3, as the next three
    "gpt-175b": 175.0,
    "gpt-530b": 530.0,
    "gpt-1t": 1008.0,
    "gpt-oss-20b": 20.91,  # https://huggingface.co/openai/gpt-oss-20b, arXiv 2508.10925, table 1
    "gpt-oss-120b": 116.83,  # arXiv 2508.10925, table 1
    "imagebind-like": 1.2,  # https://github.com/facebookresearch/ImageBind, its checkpoint
    "kimi-k2": 1026.0,  # https://huggingface.co/moonshotai/Kimi-K2-Base
    "llama-2-7b": 6.738,  # https://huggingface.co/meta-llama/Llama-2-7b-hf
    "llama-3-8b": 8.03,  # https://huggingface.co/meta-llama/Meta-Llama-3-8B
    "llama-3-70b": 70.55,  # https://huggingface.co/meta-llama/Meta-Llama-3-70B
    "llama-3.1-405b": 405.85,  # https://huggingface.co/meta-llama/Llama-3.1-405B
    "llava-1.5-7b": 7.06,  # https://huggingface.co/llava-hf/llava-1.5-7b-hf
    "mixtral-8x7b": 46.7,  # https://huggingface.co/mistralai/Mixtral-8x7B-v0.1
    "mixtral-8x22b": 140.6,  # https://huggingface.co/mistralai/Mixtral-8x22B-v0.1
    "moonlight-16b-a3b": 15.96,  # https://huggingface.co/moonshotai/Moonlight-16B-A3B
    "nemotron-3-nano-30b-a3b": 31.6,  # its card
    "nemotron-3-super-120b-a12b": 120.6,  # its card
    "ofasys-like": 0.66,  # arXiv 2409.03365, table of its models
    "qwen2.5-32b": 32.76,  # https://huggingface.co/Qwen/Qwen2.5-32B
    "qwen2.5-vl-7b": 8.29,  # https://huggingface.co/Qwen/Qwen2.5-VL-7B-Instruct
    "qwen2.5-vl-72b": 73.4,  # https://huggingface.co/Qwen/Qwen2.5-VL-72B-Instruct
    "qwen3-8b": 8.19,  # https://huggingface.co/Qwen/Qwen3-8B
    "qwen3-32b": 32.76,  # https://huggingface.co/Qwen/Qwen3-32B
    "qwen3-30b-a3b": 30.53,  # https://huggingface.co/Qwen/Qwen3-30B-A3B
    "qwen3-235b-a22b": 235.09,  # https://huggingface.co/Qwen/Qwen3-235B-A22B
    "qwen3-vl-30b-a3b": 31.07,  # https://huggingface.co/Qwen/Qwen3-VL-30B-A3B-Instruct
}


def total(name):
    modules = load_model(name).modules.values()
    return sum(module_parameters(module, multiple=1).total for module in modules)


@pytest.mark.parametrize("name", PUBLISHED)
def test_shipped_model_has_its_published_parameters(name):
    tolerance = 0.04 if name == "ofasys-like" else 0.01

    assert total(name) == pytest.approx(PUBLISHED[name] * 1e9, rel=tolerance)


def test_qwen_3_8_has_every_weight_of_its_checkpoint():
    # https://github.com/onnxruntime/mobius/issues/483: 18 shards with 55,562,855 thousand bytes of
    # weights in 2 bytes each: language model, tower, merger, and a layer that predicts ahead.
    ahead = mtp_parameters(load_model("qwen3.8-27b").language, multiple=1).total
    assert 2 * (total("qwen3.8-27b") + ahead) // 1000 == 55_562_855


def test_qwen_3_vl_2b_has_its_published_parameters():
    # https://huggingface.co/Qwen/Qwen3-VL-2B-Instruct: 2.13 billion, and in them three mergers for
    # middle layers, each of a norm and two multiplications, that our tower does without.
    merger = 2 * 4096 + 4096 * 4096 + 4096 + 4096 * 2048 + 2048

    assert total("qwen3-vl-2b") + 3 * merger == pytest.approx(2.13e9, rel=0.005)


def test_unified_io_2_has_the_layers_of_both_its_halves():
    # 48 layers of attention and of a gated linear unit, each with four norms (two over 64 values).
    layer = 4 * 1024 * 1024 + 3 * 1024 * 2816 + 2 * 1024 + 2 * 64

    language = module_parameters(load_model("unified-io-2-like").language, multiple=1).total

    assert language == 48 * layer + 33280 * 1024 + 1024


def test_vit_22b_has_its_published_parameters():
    vision = load_model("vit-22b-gpt-175b").modules["vision"]

    # arXiv 2302.05442, table 1: 21,743 million; without our projector to GPT's size, 75 million.
    assert module_parameters(vision).total - 6144 * 12288 - 12288 == pytest.approx(21.743e9, 1e-3)


@pytest.mark.parametrize("name", shipped_models())
def test_shipped_model_survives_being_written(name):
    model = load_model(name)

    assert parse_model(write_model(model), where="again") == model


@pytest.mark.parametrize("name", shipped_models())
def test_shipped_model_says_its_source(name):
    assert all("https://" in source for source in load_model(name).sources)
    assert load_model(name).sources
    assert load_model(name).name == name


def test_model_file_gives_every_field():
    model = parse_model(VLM, where="small")
    vision, language = model.modules["vision"], model.language

    assert (model.name, model.precision, model.sources) == (
        "small",
        "fp8",
        ("a paper", "its code"),
    )
    assert model.edges == (("vision", "language"),)
    assert (vision.norm, vision.causal, vision.lora_rank) == ("layer", False, 8)
    assert vision.input == Patches(values=588, num_positions=17, extra_tokens=1)
    assert vision.output == Projector(sizes=(256, 128), merged_tokens=4)
    assert vision.trainable == ("projector", "*lora*")
    # No image in a quarter of the samples, two in the others; 4 of 16 tokens leave.
    assert vision.items_per_sample == Distribution((0, 2), (0.25, 0.75))
    assert vision.rows_per_sample == 1.5 * 4
    assert (language.norm, language.causal, language.trainable) == ("rms", True, ())
    assert language.input == TokenEmbedding(vocab_size=1000)
    assert language.output == LanguageHead(vocab_size=1000, tied=True, mtp_layers=1)
    assert model.sequence_length == 256


def test_layers_are_runs_of_their_kinds():
    language = parse_model(VLM, where="small").language

    attention = SelfAttention(num_heads=8, num_query_groups=2, head_dim=16)
    dense = Layer(mixer=attention, mlp=Mlp(ffn_hidden_size=512))
    moe = Layer(
        mixer=attention, mlp=Experts(num_experts=4, experts_per_token=2, ffn_hidden_size=64)
    )
    # dense, then twice: moe moe dense
    assert language.layers == ((1, dense), (2, moe), (1, dense), (2, moe), (1, dense))


def test_written_model_survives_being_written():
    model = parse_model(VLM, where="small")

    assert parse_model(write_model(model), where="again") == model


def test_kinds_of_attention_and_experts_are_told_apart():
    # Nemotron 3 Super, arXiv and card: 40 Mamba-2, 40 expert and 8 attention layers.
    layers = list(load_model("nemotron-3-super-120b-a12b").language.each_layer())
    assert Counter(type(layer.mixer or layer.mlp) for layer in layers) == {
        StateSpace: 40,
        Experts: 40,
        SelfAttention: 8,
    }

    # Qwen3-Next: three layers of linear attention, then one of softmax attention.
    mixers = [type(run.layer.mixer) for run in load_model("qwen3-next-80b-a3b").language.layers]
    assert mixers == [LinearAttention, SelfAttention] * 12

    # DeepSeek-V3: 3 dense layers, then 58 of experts, all with latent attention.
    runs = load_model("deepseek-v3").language.layers
    assert [(run.count, type(run.layer.mlp)) for run in runs] == [(3, Mlp), (58, Experts)]
    assert {type(run.layer.mixer) for run in runs} == {LatentAttention}


def test_windows_of_gpt_oss_alternate():
    mixers = [layer.mixer for layer in load_model("gpt-oss-20b").language.each_layer()]

    assert [mixer.window for mixer in mixers if isinstance(mixer, SelfAttention)] == [
        128,
        None,
    ] * 12


def test_repeated_layers_are_written_once():
    a, b = (Layer(mixer=None, mlp=Mlp(ffn_hidden_size=size)) for size in (1, 2))
    runs = merged_runs([a, a, a, b] * 5 + [a])

    assert write_runs(runs, {a: "a", b: "b"}) == [{"repeat": 5, "pattern": [{"a": 3}, "b"]}, "a"]


@given(st.lists(st.integers(0, 2), min_size=1, max_size=40))
def test_any_order_of_layers_survives_being_written(order):
    kinds = {f"k{i}": Layer(mixer=None, mlp=Mlp(ffn_hidden_size=i + 1)) for i in range(3)}
    names = {layer: name for name, layer in kinds.items()}
    runs = merged_runs([kinds[f"k{index}"] for index in order])

    assert read_runs("layers", write_runs(runs, names), kinds) == runs
