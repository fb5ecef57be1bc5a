import json
from dataclasses import replace

import pytest

from megatron_mosaic.errors import LayoutError, PlanError
from megatron_mosaic.model.huggingface import read_huggingface
from megatron_mosaic.model.layers import SelfAttention
from megatron_mosaic.model.parameters import module_parameters
from megatron_mosaic.model.shipped import load_model
from megatron_mosaic.model.tokens import Distribution

LLAMA = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}
QWEN3_MOE = {
    "model_type": "qwen3_moe",
    "decoder_sparse_step": 1,
    "head_dim": 128,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "max_window_layers": 48,
    "mlp_only_layers": [],
    "moe_intermediate_size": 768,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
DEEPSEEK_V3 = {
    "model_type": "deepseek_v3",
    "first_k_dense_replace": 3,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "vocab_size": 129280,
}
GPT_OSS = {
    "model_type": "gpt_oss",
    "attention_bias": True,
    "head_dim": 64,
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "layer_types": ["sliding_attention", "full_attention"] * 18,
    "num_attention_heads": 64,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "num_local_experts": 128,
    "sliding_window": 128,
    "tie_word_embeddings": False,
    "vocab_size": 201088,
}
NEMOTRON = {
    "model_type": "nemotron_h",
    "attention_bias": False,
    "conv_kernel": 4,
    "head_dim": 128,
    "hidden_size": 2688,
    "hybrid_override_pattern": "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
    "intermediate_size": 1856,
    "mamba_head_dim": 64,
    "mamba_num_heads": 64,
    "moe_intermediate_size": 1856,
    "moe_shared_expert_intermediate_size": 3712,
    "n_groups": 8,
    "n_routed_experts": 128,
    "n_shared_experts": 1,
    "num_attention_heads": 32,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 52,
    "num_key_value_heads": 2,
    "ssm_state_size": 128,
    "vocab_size": 131072,
}
LLAVA = {
    "model_type": "llava",
    "projector_hidden_act": "gelu",
    "text_config": {"model_type": "llama", "vocab_size": 32064},
    "vision_config": {
        "hidden_size": 1024,
        "image_size": 336,
        "intermediate_size": 4096,
        "model_type": "clip_vision_model",
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "patch_size": 14,
    },
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
}
QWEN25_VL = {
    "model_type": "qwen2_5_vl",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "max_window_layers": 28,
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "sliding_window": 32768,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vision_config": {
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "in_chans": 3,
        "out_hidden_size": 3584,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
        "temporal_patch_size": 2,
    },
    "vocab_size": 152064,
}
QWEN3_VISION = {
    "deepstack_visual_indexes": [8, 16, 24],
    "depth": 27,
    "hidden_size": 1152,
    "in_channels": 3,
    "intermediate_size": 4304,
    "num_heads": 16,
    "num_position_embeddings": 2304,
    "out_hidden_size": 2048,
    "patch_size": 16,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
QWEN3_VL = {
    "model_type": "qwen3_vl_moe",
    "text_config": {**QWEN3_MOE, "model_type": "qwen3_vl_moe_text", "dtype": "bfloat16"},
    "tie_word_embeddings": False,
    "vision_config": QWEN3_VISION,
}
QWEN35 = {
    "model_type": "qwen3_5",
    "text_config": {
        "attn_output_gate": True,
        "full_attention_interval": 4,
        "head_dim": 256,
        "hidden_size": 5120,
        "intermediate_size": 17408,
        "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 16,
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 128,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 48,
        "linear_value_head_dim": 128,
        "model_type": "qwen3_5_text",
        "mtp_num_hidden_layers": 1,
        "num_attention_heads": 24,
        "num_hidden_layers": 64,
        "num_key_value_heads": 4,
        "vocab_size": 248320,
    },
    "tie_word_embeddings": False,
    "vision_config": {**QWEN3_VISION, "deepstack_visual_indexes": [], "out_hidden_size": 5120},
}
INTERNVL = {
    "model_type": "internvl_chat",
    "downsample_ratio": 0.5,
    "llm_config": {
        "model_type": "internlm2",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "vocab_size": 92553,
    },
    "select_layer": -1,
    "torch_dtype": "bfloat16",
    "vision_config": {
        "model_type": "intern_vit_6b",
        "hidden_size": 1024,
        "image_size": 448,
        "intermediate_size": 4096,
        "norm_type": "layer_norm",
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "patch_size": 14,
        "qk_normalization": False,
        "qkv_bias": True,
    },
}
GPT2 = {"model_type": "gpt2", "n_embd": 1600, "n_head": 25, "n_layer": 48, "n_positions": 1024}


def read(tmp_path, config, **options):
    folder = tmp_path / "model"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return read_huggingface(folder, **options)


def geometry(model):
    """Everything but names, sources, tokens and what trains."""
    one = Distribution.constant(1)
    return {
        name: replace(module, items_per_sample=one, tokens_per_item=one, trainable=None)
        for name, module in model.modules.items()
    }


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (LLAMA, "llama-3-8b"),
        (QWEN3_MOE, "qwen3-30b-a3b"),
        (DEEPSEEK_V3, "deepseek-v3"),
        (GPT_OSS, "gpt-oss-120b"),
        (NEMOTRON, "nemotron-3-nano-30b-a3b"),
        (LLAVA, "llava-1.5-7b"),
        (QWEN25_VL, "qwen2.5-vl-7b"),
        (QWEN3_VL, "qwen3-vl-30b-a3b"),
        (QWEN35, "qwen3.5-27b"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_config_has_the_geometry_of_the_shipped_model(tmp_path, config, name):
    model = read(tmp_path, config)

    assert geometry(model) == geometry(load_model(name))
    assert model.edges == load_model(name).edges


def test_gpt2_has_its_published_parameters(tmp_path):
    model = read(tmp_path, GPT2)

    # https://huggingface.co/openai-community/gpt2-xl: 1,557,611,200.
    assert module_parameters(model.language, multiple=1).total == 1_557_611_200


def test_internvl_has_the_published_parameters(tmp_path):
    model = read(tmp_path, INTERNVL)

    vision = module_parameters(model.modules["vision"]).total
    language = module_parameters(model.language, multiple=1).total
    # https://huggingface.co/OpenGVLab/InternVL2-8B, card: 304.01M tower and 33.57M projector,
    # 7.74B language model. Its layers scale by 2 * 1024 weights each, 0.05M, which are left out.
    assert vision == pytest.approx(304.01e6 + 33.57e6, rel=1e-3)
    assert language == pytest.approx(7.74e9, rel=2e-3)
    assert model.modules["vision"].tokens_per_item.mean == 1024
    assert model.modules["vision"].rows_per_sample == 256


def test_shared_layers_before_a_moe_become_dense_ones(tmp_path):
    config = {**QWEN3_MOE, "num_hidden_layers": 4, "decoder_sparse_step": 2, "mlp_only_layers": [3]}

    model = read(tmp_path, config)

    # Every second layer has experts (1, 3), but 3 is dense.
    assert [type(layer.mlp).__name__ for layer in model.language.each_layer()] == [
        "Mlp",
        "Experts",
        "Mlp",
        "Mlp",
    ]


def test_mistral_has_its_window_in_every_layer(tmp_path):
    config = {"model_type": "mistral", "sliding_window": 4096}

    (run,) = read(tmp_path, config).language.layers

    assert run.count == 32
    assert isinstance(run.layer.mixer, SelfAttention)
    assert run.layer.mixer.window == 4096


def test_sequence_and_image_are_what_the_caller_says(tmp_path):
    model = read(tmp_path, QWEN3_VL, name="mine", seq_length=16384, image_tokens=400)

    assert model.name == "mine"
    assert model.sequence_length == 16384
    assert model.modules["vision"].rows_per_sample == 100


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "bloom"}, r"config.json: model_type='bloom' must be one of deepseek_v2"),
        ({"model_type": "llama3"}, r"model_type='llama3' must be one of .*; did you mean llama\?"),
        ({}, "model_type=null must be one of"),
        (
            {**QWEN3_MOE, "num_experts_per_tok": None},
            "num_experts_per_tok must be given in a config of model_type=qwen3_moe",
        ),
        ({**LLAMA, "hidden_size": -1}, "hidden_size=-1 must be >= 1"),
        ({**LLAMA, "num_hidden_layers": "32"}, "num_hidden_layers='32' must be an integer"),
        (
            {**LLAVA, "vision_config": {"model_type": "vit"}},
            "model_type='vit' must be clip_vision_model or siglip_vision_model",
        ),
        ({**LLAVA, "vision_config": None}, "vision_config must be a mapping"),
        (
            {**LLAVA, "text_config": {"model_type": "opt"}},
            "model_type='opt' must be one of .* for a language model",
        ),
        ({**NEMOTRON, "hybrid_override_pattern": "M?"}, r"layer='\?' must be one of M \* - E"),
    ],
)
def test_config_that_is_not_supported_has_one_clear_line(tmp_path, config, message):
    with pytest.raises(PlanError, match=message) as caught:
        read(tmp_path, config)

    assert "\n" not in str(caught.value)


def test_heads_that_groups_do_not_divide_are_refused(tmp_path):
    with pytest.raises(LayoutError, match="num_attention_heads=32 must be a multiple of num_query"):
        read(tmp_path, {**LLAMA, "num_key_value_heads": 5})


def test_file_that_is_no_json_is_refused(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"model_type": ')

    with pytest.raises(PlanError, match=r"config\.json: line 1: text must be JSON"):
        read_huggingface(path)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(PlanError, match=r"config\.json: file must be readable"):
        read_huggingface(tmp_path / "config.json")


def test_config_is_loaded_by_its_path(tmp_path):
    read(tmp_path, LLAMA)

    by_folder = load_model(str(tmp_path / "model"))

    assert by_folder == load_model(str(tmp_path / "model" / "config.json"))
    assert by_folder.name == "model"


def test_both_forms_of_internvl_are_the_same(tmp_path):
    vision = {**INTERNVL["vision_config"], "image_size": [448, 448], "patch_size": [14, 14]}
    native = {
        "model_type": "internvl",
        "downsample_ratio": 0.5,
        "text_config": INTERNVL["llm_config"],
        "vision_config": {**vision, "model_type": "internvl_vision", "attention_bias": True},
        "vision_feature_layer": -1,
    }

    assert geometry(read(tmp_path, native)) == geometry(read(tmp_path, INTERNVL))


def test_layers_of_nemotron_may_be_spelled_out(tmp_path):
    names = {"M": "mamba", "E": "moe", "*": "attention"}
    blocks = [names[letter] for letter in NEMOTRON["hybrid_override_pattern"]]
    config = {**NEMOTRON, "hybrid_override_pattern": None, "layers_block_type": blocks}

    assert geometry(read(tmp_path, config)) == geometry(read(tmp_path, NEMOTRON))
