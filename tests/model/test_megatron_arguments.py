from dataclasses import replace

import pytest

from megatron_mosaic.errors import LayoutError, PlanError
from megatron_mosaic.model.layers import Experts, LinearAttention, Mlp, SelfAttention, StateSpace
from megatron_mosaic.model.megatron_arguments import parse_megatron_arguments
from megatron_mosaic.model.shipped import load_model
from megatron_mosaic.model.tokens import Distribution

LLAMA = (
    "--num-layers 32 --hidden-size 4096 --ffn-hidden-size 14336 --num-attention-heads 32 "
    "--group-query-attention --num-query-groups 8 --swiglu --disable-bias-linear "
    "--normalization RMSNorm --position-embedding-type rope --max-position-embeddings 8192 "
    "--untie-embeddings-and-output-weights --vocab-size 128256 --seq-length 8192 --bf16 "
    "--tensor-model-parallel-size 2 --lr 3e-4 --data-path a b"
)
GPT = (
    "--num-layers 96 --hidden-size 12288 --num-attention-heads 96 --vocab-size 51200 "
    "--seq-length 2048 --max-position-embeddings 2048"
)
DEEPSEEK = (
    "--num-layers 61 --hidden-size 7168 --ffn-hidden-size 18432 --num-attention-heads 128 "
    "--multi-latent-attention --q-lora-rank 1536 --kv-lora-rank 512 --qk-head-dim 128 "
    "--qk-pos-emb-head-dim 64 --v-head-dim 128 --swiglu --disable-bias-linear "
    "--normalization RMSNorm --position-embedding-type rope --num-experts 256 "
    "--moe-layer-freq ([0]*3+[1]*58) --moe-ffn-hidden-size 2048 --moe-router-topk 8 "
    "--moe-shared-expert-intermediate-size 2048 --mtp-num-layers 1 "
    "--untie-embeddings-and-output-weights --vocab-size 129280 --seq-length 4096 --bf16"
)
NEMOTRON = (
    "--hidden-size 2688 --ffn-hidden-size 1856 --num-attention-heads 32 --num-query-groups 2 "
    "--group-query-attention --kv-channels 128 --disable-bias-linear --squared-relu "
    "--normalization RMSNorm --position-embedding-type none --num-experts 128 "
    "--moe-router-topk 6 --moe-ffn-hidden-size 1856 --moe-shared-expert-intermediate-size 3712 "
    "--mamba-num-heads 64 --mamba-state-dim 128 --mamba-head-dim 64 --mamba-num-groups 8 "
    "--hybrid-layer-pattern MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME "
    "--untie-embeddings-and-output-weights --vocab-size 131072 --seq-length 8192 --bf16"
)
VLM = (
    "--num-layers 24 --encoder-num-layers 12 --hidden-size 1024 --num-attention-heads 16 "
    "--vocab-size 51200 --seq-length 576 --dataloader-seq-length 512 "
    "--max-position-embeddings 512 --img-h 336 --img-w 336 --patch-dim 14 --freeze-ViT --bf16"
)


@pytest.mark.parametrize(
    ("line", "name"),
    [
        (LLAMA, "llama-3-8b"),
        (GPT, "gpt-175b"),
        (DEEPSEEK, "deepseek-v3"),
        (NEMOTRON, "nemotron-3-nano-30b-a3b"),
    ],
)
def test_arguments_have_the_geometry_of_the_shipped_model(line, name):
    model = parse_megatron_arguments(line)

    tokens = load_model(name).language.tokens_per_item
    assert replace(model.language, tokens_per_item=tokens) == load_model(name).language


def test_precision_is_that_of_multiplications():
    assert parse_megatron_arguments(LLAMA).precision == "bf16"
    assert parse_megatron_arguments(GPT).precision == "fp32"
    assert parse_megatron_arguments(f"{LLAMA} --fp8-format hybrid").precision == "fp8"
    assert (
        parse_megatron_arguments(f"{LLAMA} --fp8-format e4m3 --fp8-recipe mxfp8").precision
        == "mxfp8"
    )


def test_ffn_of_swiglu_is_megatrons_default():
    model = parse_megatron_arguments(
        "--num-layers 2 --hidden-size 1024 --num-attention-heads 8 --swiglu --vocab-size 1024 "
        "--seq-length 128 --disable-bias-linear"
    )

    # 4 * 1024 * 2 / 3 = 2730, rounded down to a multiple of 64.
    assert model.language.layers[0].layer.mlp == Mlp(ffn_hidden_size=2688)


def test_vlm_has_a_tower_in_the_sizes_of_the_language_model():
    model = parse_megatron_arguments(VLM)
    vision = model.modules["vision"]

    # (336 / 14)^2 = 576 pieces and the class token, beside 512 tokens of text.
    assert model.sequence_length == 512 + 577
    assert vision.rows_per_sample == 577
    assert (vision.num_layers, vision.hidden_size) == (12, 1024)
    assert vision.trainable == ("projector",)
    assert model.language.trainable is None
    assert model.edges == (("vision", "language"),)


def test_vlm_without_class_token_gives_one_row_less():
    model = parse_megatron_arguments(f"{VLM} --disable-vision-class-token --freeze-LM")

    assert model.modules["vision"].rows_per_sample == 576
    assert model.sequence_length == 512 + 576
    assert model.language.trainable == ()


def test_windows_and_linear_attention_skip_every_nth_layer():
    base = (
        "--num-layers 4 --hidden-size 1024 --num-attention-heads 8 --vocab-size 1024 "
        "--seq-length 128"
    )
    windows = parse_megatron_arguments(f"{base} --window-size (127,0) --window-attn-skip-freq 2")
    linear = parse_megatron_arguments(f"{base} --linear-attention-freq 4")

    seen = [layer.mixer for layer in windows.language.each_layer()]
    assert [mixer.window for mixer in seen if isinstance(mixer, SelfAttention)] == [
        128,
        None,
        128,
        None,
    ]
    assert [run.count for run in linear.language.layers] == [3, 1]
    assert isinstance(linear.language.layers[0].layer.mixer, LinearAttention)


def test_number_of_experts_applies_to_the_first_of_every_n_layers():
    model = parse_megatron_arguments(
        "--num-layers 4 --hidden-size 1024 --num-attention-heads 8 --vocab-size 1024 "
        "--seq-length 128 --num-experts 4 --moe-layer-freq 2"
    )

    kinds = [type(layer.mlp) for layer in model.language.each_layer()]
    assert kinds == [Experts, Mlp, Experts, Mlp]


def test_hybrid_pattern_counts_levels_of_prediction_and_ignores_stages():
    model = parse_megatron_arguments(
        "--hidden-size 1024 --num-attention-heads 8 --vocab-size 1024 --seq-length=128 "
        "--hybrid-layer-pattern M-|M*/M*/M*"
    )

    layers = list(model.language.each_layer())
    assert len(layers) == 4
    # Twice as wide as a token: 2 * 1024 / 64 heads.
    assert layers[0].mixer == StateSpace(num_heads=32, head_dim=64, state_size=128, num_groups=8)
    assert model.language.output == replace(model.language.output, mtp_layers=2)
    assert model.language.tokens_per_item == Distribution.constant(128)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            GPT.replace("--num-layers", "--num-layer"),
            "--num-layers must be given",
        ),
        (GPT.replace("96", "x"), "--num-layers='x' must be an integer"),
        (GPT.replace("12288", "-5"), "--hidden-size=-5 must be >= 1"),
        (GPT.replace("--vocab-size", "--vocab"), "--vocab-size must be given"),
        (GPT.replace("--seq-length", "--seq"), "--seq-length must be given"),
        (GPT.replace("--hidden-size", "--hidden-sise"), r"did you mean --hidden-sise\?"),
        (f"{DEEPSEEK} --moe-layer-freq foo(1)", r"--moe-layer-freq='foo\(1\)' must be a number"),
        (f"{DEEPSEEK} --moe-layer-freq 0", "--moe-layer-freq=0 must be >= 1"),
        (f"{GPT} --window-size 128", "--window-size='128' must be two numbers"),
        (f"{GPT} --hybrid-layer-pattern MX", "layer='X' must be one of M G"),
    ],
)
def test_wrong_argument_has_one_clear_line(line, message):
    with pytest.raises(PlanError, match=message) as caught:
        parse_megatron_arguments(line)

    assert "\n" not in str(caught.value)


def test_pattern_of_another_length_is_refused():
    with pytest.raises(LayoutError, match="length=4 must be --num-layers=61"):
        parse_megatron_arguments(f"{DEEPSEEK} --moe-layer-freq ([0]+[1]*3)")


def test_file_of_arguments_may_have_comments_and_broken_lines(tmp_path):
    path = tmp_path / "llama.args"
    path.write_text("# the model\n" + LLAMA.replace(" --swiglu", " \\\n  --swiglu"))

    model = load_model(str(path))

    assert model.name == "llama"
    assert model.language == load_model("llama-3-8b").language


def test_file_of_arguments_is_named_in_messages(tmp_path):
    path = tmp_path / "gpt.args"
    path.write_text(GPT.replace("--num-layers", "--layers"))
    with pytest.raises(PlanError, match=r"gpt\.args: --num-layers must be given"):
        load_model(str(path))

    path.write_text("--num-layers '96")
    with pytest.raises(PlanError, match=r"gpt\.args: text must be .*close the quote"):
        load_model(str(path))
