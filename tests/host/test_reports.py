from types import MappingProxyType, SimpleNamespace

import pytest

ARGUMENTS = SimpleNamespace(
    seq_length=4,  # image tokens that the language model gets
    disable_vision_class_token=True,
    hidden_size=8,
    ffn_hidden_size=16,
    num_attention_heads=2,
    num_query_groups=None,
    group_query_attention=False,
    kv_channels=4,
    swiglu=False,
    patch_dim=2,
    encoder_num_layers=3,
)


def _encoder_flops(num_images, trained=MappingProxyType({}), **changes):
    from megatron_mosaic.host.cpu import run_on_cpu

    run_on_cpu()
    from megatron_mosaic.host.reports import encoder_flops

    return encoder_flops(
        SimpleNamespace(**{**vars(ARGUMENTS), **changes}), num_images, trained=trained
    )


def test_encoder_flops_of_one_image():
    # Per token and layer: QKV 2*8*24 = 384, output 128, attention 4*5*8 = 160, MLP 2*2*8*16 = 512.
    # Patches 2*8*3*4 = 192. Five tokens: 5 * (3*1184 + 192) = 18720. Projector: 4*512 = 2048.
    assert _encoder_flops(1) == 3 * 18720 + 3 * 2048


def test_encoder_flops_of_a_frozen_transformer_have_no_backward_pass():
    assert _encoder_flops(1, {"encoder": 0.0, "projector": 1.0}) == 18720 + 3 * 2048
    assert _encoder_flops(1, {"encoder": 0.0, "projector": 0.0}) == 18720 + 2048


def test_encoder_flops_of_adapters_have_the_gradient_of_the_input():
    # An eighth of the transformer's weights trains; the projector passes the gradient on.
    trained = {"encoder": 0.125, "projector": 0.0}
    assert _encoder_flops(1, trained) == 2.125 * 18720 + 2 * 2048


def test_encoder_flops_grow_with_the_images():
    assert _encoder_flops(6) == 6 * _encoder_flops(1)
    assert _encoder_flops(0) == 0


def test_encoder_flops_of_a_gated_mlp_have_a_third_linear_layer():
    extra = _encoder_flops(1, swiglu=True) - _encoder_flops(1)

    # 256 more per token: 5 tokens in 3 layers and 4 in the projector, three passes.
    assert extra == pytest.approx(3 * 256 * (5 * 3 + 4))
