from dataclasses import replace

import pytest

from megatron_mosaic.cost.model_flops import (
    forward_flops_per_token,
    model_flops_per_token,
    step_flops_per_token,
)
from megatron_mosaic.cost.operations import TaskTokens, Workplace, layer_operations
from megatron_mosaic.cost.sizes import ParallelSizes, TrainingSettings
from megatron_mosaic.model.layers import Experts, Layer, Mlp, SelfAttention
from megatron_mosaic.model.shipped import load_model
from megatron_mosaic.model.tokens import Distribution

LLAMA_LAYER = Layer(
    mixer=SelfAttention(num_heads=32, num_query_groups=8, head_dim=128),
    mlp=Mlp(ffn_hidden_size=14336),
)
TASK = TaskTokens(tokens=4096, pairs=4096 * 4096 / 2, all_pairs=4096 * 4096)


def place(hidden_size=4096, task=TASK, precision="bf16", **sizes):
    settings = TrainingSettings()
    return Workplace(
        hidden_size=hidden_size,
        task=task,
        sizes=ParallelSizes(**sizes),
        settings=settings,
        precision=precision,
    )


def flops(layer, where, *, curve=None):
    return sum(it.flops for it in layer_operations(layer, where) if curve in (None, it.curve))


def test_matmul_flops_of_a_llama_layer():
    # 2 * 4096 tokens * (4096 * (4096 + 2*1024) + 4096*4096 + 3 * 4096*14336) weights.
    assert flops(LLAMA_LAYER, place(), curve="matmul") == 2 * 4096 * 218_103_808


def test_attention_flops_of_a_causal_llama_layer():
    # 2 * 4096^2/2 pairs * 32 heads * (128 + 128).
    assert flops(LLAMA_LAYER, place(), curve="attention") == 137_438_953_472


def test_attention_without_a_mask_has_twice_the_flops():
    whole = replace(TASK, pairs=TASK.all_pairs)

    causal, full = (flops(LLAMA_LAYER, place(task=it), curve="attention") for it in (TASK, whole))
    assert full == 2 * causal


def test_window_bounds_the_pairs_of_attention():
    near = replace(LLAMA_LAYER, mixer=replace(LLAMA_LAYER.mixer, window=128))

    # 2 * 4096 * 128 pairs * 32 heads * 256.
    assert flops(near, place(), curve="attention") == 8_589_934_592


def test_tensor_parallel_ranks_share_all_flops():
    assert flops(LLAMA_LAYER, place(tp=4)) * 4 == flops(LLAMA_LAYER, place())


def test_experts_compute_for_each_expert_of_a_token():
    experts = Experts(num_experts=128, experts_per_token=8, ffn_hidden_size=768)
    layer = Layer(mixer=None, mlp=experts)

    # 2 * 4096 tokens * 8 experts * 3 * 2048*768, whatever number of ranks shares the experts.
    expected = 2 * 4096 * 8 * 3 * 2048 * 768
    for ep in (1, 8):
        assert flops(layer, place(2048, ep=ep), curve="grouped_matmul") == expected


def test_expert_ranks_share_the_weights_of_experts():
    layer = Layer(
        mixer=None, mlp=Experts(num_experts=128, experts_per_token=8, ffn_hidden_size=768)
    )

    def weights(ep):
        return sum(it.weights for it in layer_operations(layer, place(2048, ep=ep)))

    assert weights(8) * 8 == weights(1) == 128 * 3 * 2048 * 768


def test_low_precision_casts_what_it_multiplies():
    def moved(precision):
        operations = layer_operations(LLAMA_LAYER, place(precision=precision))
        return sum(it.forward_bytes for it in operations if it.curve == "elementwise")

    # Inputs of the four multiplications: 4096 tokens * (4096 + 4096 + 4096 + 14336) values, each
    # read, written and written transposed: 2 + 1 + 1 bytes.
    assert moved("mxfp8") - moved("bf16") == 4096 * 26624 * 4


def test_step_flops_of_gpt3_are_the_published_formula():
    model = load_model("gpt-3-175b").language
    s, layers, h, v = 2048, 96, 12288, model.output.vocab_size

    # Narayanan et al., arXiv 2104.04473, appendix, without recomputation:
    # 72 s l h^2 (1 + s/6h + V/12lh) by sample, with attention over all pairs.
    expected = 72 * layers * h**2 * (1 + s / (6 * h) + v / (12 * layers * h))
    assert model_flops_per_token(model, full_attention=True) == pytest.approx(expected, rel=1e-9)


def test_step_flops_of_a_trained_model_are_three_forward_passes():
    model = load_model("llama-3-8b").language

    assert step_flops_per_token(model) == pytest.approx(3 * forward_flops_per_token(model))


def test_step_flops_of_a_frozen_model_are_one_forward_pass():
    model = replace(load_model("llama-3-8b").language, trainable=())

    assert step_flops_per_token(model) == forward_flops_per_token(model)


def test_lora_needs_the_published_share_of_the_flops():
    model = load_model("llama-3-70b").language
    full = replace(model, tokens_per_item=Distribution.constant(4096.0))
    adapted = replace(full, trainable=("*lora*",), lora_rank=16)

    # Megatron-Bridge 26.06: 278.8 and 432.5 GFLOP by token; for LoRA it counts packed samples,
    # about 230 tokens each, which attend to 115 others on average.
    ratio = step_flops_per_token(adapted, pairs_per_token=115) / model_flops_per_token(full)
    assert ratio == pytest.approx(278.8 / 432.5, rel=0.03)


@pytest.mark.parametrize(
    ("name", "length", "gflops"),
    [
        # TFLOPS over tokens/s of rows of Megatron-Bridge's releases.
        ("deepseek-v3", 4096, 260.0),
        ("qwen3-235b-a22b", 4096, 148.1),
        ("gpt-oss-120b", 4096, 32.6),
        ("llama-3.1-405b", 8192, 2525),
        ("nemotron-3-super-120b-a12b", 8192, 84.3),
    ],
)
def test_step_flops_are_what_sources_count(name, length, gflops):
    model = load_model(name).language
    model = replace(model, tokens_per_item=Distribution.constant(float(length)))

    assert model_flops_per_token(model) / 1e9 == pytest.approx(gflops, rel=0.01)
