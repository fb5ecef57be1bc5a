from dataclasses import replace

import pytest

from megatron_mosaic.model.layers import (
    Experts,
    LatentAttention,
    Layer,
    LinearAttention,
    Mlp,
    SelfAttention,
    StateSpace,
)
from megatron_mosaic.model.parameters import (
    adapter_parameters,
    input_parameters,
    layer_parameters,
    module_parameters,
    mtp_parameters,
    output_parameters,
    padded_vocab_size,
    projector_parameters,
)
from megatron_mosaic.model.spec import (
    LanguageHead,
    LayerRun,
    ModuleSpec,
    Patches,
    Projector,
    TokenEmbedding,
)
from megatron_mosaic.model.tokens import Distribution

LLAMA_LAYER = Layer(
    mixer=SelfAttention(num_heads=32, num_query_groups=8, head_dim=128),
    mlp=Mlp(ffn_hidden_size=14336),
)
LATENT = LatentAttention(
    num_heads=128,
    query_rank=1536,
    key_value_rank=512,
    head_dim=128,
    rotary_head_dim=64,
    value_head_dim=128,
)


def language(*, hidden_size, layers, vocab_size, tied=False, norm="rms", num_positions=0):
    return ModuleSpec(
        name="language",
        hidden_size=hidden_size,
        layers=layers,
        norm=norm,
        input=TokenEmbedding(vocab_size=vocab_size, num_positions=num_positions),
        output=LanguageHead(vocab_size=vocab_size, tied=tied),
        items_per_sample=Distribution.constant(1),
        tokens_per_item=Distribution.constant(4096),
    )


def test_module_parameters_of_llama_3_8b_are_the_published_ones():
    module = language(hidden_size=4096, layers=(LayerRun(32, LLAMA_LAYER),), vocab_size=128256)

    # https://huggingface.co/meta-llama/Meta-Llama-3-8B: 8,030,261,248.
    assert module_parameters(module).total == 8_030_261_248


def test_module_parameters_of_deepseek_v3_are_the_published_ones():
    experts = Experts(
        num_experts=256, experts_per_token=8, ffn_hidden_size=2048, shared_ffn_hidden_size=2048
    )
    module = language(
        hidden_size=7168,
        layers=(
            LayerRun(3, Layer(mixer=LATENT, mlp=Mlp(ffn_hidden_size=18432))),
            LayerRun(58, Layer(mixer=LATENT, mlp=experts)),
        ),
        vocab_size=129280,
    )

    counts = module_parameters(module)

    # arXiv 2412.19437, abstract: 671B, of which 37B are active (without the embedding: 36.6B).
    assert counts.total == pytest.approx(671e9, rel=1e-3)
    assert counts.active - 129280 * 7168 == pytest.approx(37e9, rel=0.02)


def test_layer_parameters_of_a_tensor_parallel_rank_keep_norms_whole():
    whole = layer_parameters(LLAMA_LAYER, hidden_size=4096).dense
    rank = layer_parameters(LLAMA_LAYER, hidden_size=4096, tp=8).dense

    # 4096*(4096+2*1024) + 4096*4096 + 3*4096*14336 = 218,103,808 in maps, and two norms of 4096.
    assert whole == 218_103_808 + 8192
    assert rank == 218_103_808 // 8 + 8192


def test_layer_parameters_with_fewer_groups_than_ranks_are_cut_evenly():
    layer = Layer(mixer=SelfAttention(num_heads=8, num_query_groups=2, head_dim=4), mlp=None)

    # (32 + 2*8 + 32) * 32 / 4 = 640, and one norm of 32.
    assert layer_parameters(layer, hidden_size=32, tp=4).dense == 672


def test_layer_parameters_keep_the_bias_of_an_output_projection_on_every_rank():
    layer = Layer(
        mixer=SelfAttention(num_heads=4, num_query_groups=4, head_dim=4, bias=True),
        mlp=Mlp(ffn_hidden_size=64, gated=False, bias=True),
    )

    # Attention: (48*16 + 16*16)/2 = 512, biases 48/2 + 16 = 40.
    # MLP: 2*16*64/2 = 1024, biases 64/2 + 16 = 48. Norms: 2 * 2*16 = 64.
    assert layer_parameters(layer, hidden_size=16, norm="layer", tp=2).dense == 1688


def test_layer_parameters_of_experts_are_split_over_two_axes():
    layer = Layer(mixer=None, mlp=Experts(num_experts=8, experts_per_token=2, ffn_hidden_size=32))

    counts = layer_parameters(layer, hidden_size=16, ep=4, etp=2)

    # Two of eight experts, each 3*16*32/2 = 768. Router 8*16 and a norm of 16.
    assert counts.experts == 1536
    assert counts.dense == 144


def test_layer_parameters_of_a_state_space_layer_are_those_of_mamba_2():
    # Mamba-2 2.7B (https://huggingface.co/state-spaces/mamba2-2.7b): 64 layers, hidden 2560,
    # inner 5120, 80 heads of 64, state 128, one group; 2,702,599,680 with an embedding of 50288.
    mixer = StateSpace(num_heads=80, head_dim=64, state_size=128, num_groups=1)
    module = language(
        hidden_size=2560,
        layers=(LayerRun(64, Layer(mixer=mixer, mlp=None)),),
        vocab_size=50288,
        tied=True,
    )

    assert module_parameters(module, multiple=1).total == 2_702_599_680


def test_layer_parameters_of_linear_attention_count_gates_and_convolution():
    mixer = LinearAttention(num_key_heads=2, num_value_heads=4, key_head_dim=8, value_head_dim=8)
    layer = Layer(mixer=mixer, mlp=None)

    # In: (2*16 + 2*32 + 2*4) * 32 = 3328; convolution (32+32)*4 = 256; per head 2*4 = 8;
    # out 32*32 = 1024; norm of a head 8; norm 32.
    assert layer_parameters(layer, hidden_size=32).dense == 4656


def test_padded_vocab_size_gives_each_rank_a_multiple_of_128():
    assert padded_vocab_size(32000, tp=8) == 32768
    assert padded_vocab_size(32000) == 32000


def test_output_parameters_of_a_tied_head_appear_with_a_second_stage():
    module = language(hidden_size=16, layers=(), vocab_size=256, tied=True)

    assert output_parameters(module) == 16
    assert output_parameters(module, pp=2) == 16 + 256 * 16


def test_input_parameters_of_clip_are_those_of_its_embedding():
    module = ModuleSpec(
        name="vision",
        hidden_size=1024,
        layers=(),
        norm="layer",
        input=Patches(values=588, num_positions=577, extra_tokens=1, normed=True),
        items_per_sample=Distribution.constant(1),
        tokens_per_item=Distribution.constant(577),
    )

    # 588*1024 map, 577*1024 positions, 1024 class token, 2*1024 norm.
    assert input_parameters(module, tp=4) == 602_112 + 590_848 + 1024 + 2048


def test_projector_parameters_are_split_by_columns_then_rows():
    projector = Projector(sizes=(8, 32, 16))

    # 8*32/2 + 32/2, then 32*16/2 + 16.
    assert projector_parameters(projector, tp=2) == 128 + 16 + 256 + 16


def test_adapter_parameters_of_llama_3_70b():
    layer = Layer(
        mixer=SelfAttention(num_heads=64, num_query_groups=8, head_dim=128),
        mlp=Mlp(ffn_hidden_size=28672),
    )

    # Rank 16: qkv 8192+10240, projection 8192+8192, fc1 8192+57344, fc2 28672+8192.
    assert adapter_parameters(layer, hidden_size=8192, lora_rank=16) == 16 * 137_216


def test_mtp_parameters_of_a_last_stage_have_a_copy_of_the_table():
    module = replace(
        language(hidden_size=4096, layers=(LayerRun(2, LLAMA_LAYER),), vocab_size=128256),
        output=LanguageHead(vocab_size=128256, mtp_layers=1),
    )

    # A layer, three norms of 4096, a map of 8192*4096; and 128256*4096 on another stage.
    assert mtp_parameters(module).dense == 218_112_000 + 12_288 + 33_554_432
    assert mtp_parameters(module, pp=2).dense - mtp_parameters(module).dense == 525_336_576
