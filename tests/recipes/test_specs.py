"""Recipes' models, built by Megatron on the meta device: their parameters are the model file's."""

import torch

from megatron_mosaic.model.parameters import module_parameters
from megatron_mosaic.recipes.catalog import RECIPES
from tests.ranks import run_ranks

NAMES = (
    "llava_15_7b_sft_8gpu_h100_bf16",
    "siglip_whisper_mistral_7b_pretrain_16gpu_h100_bf16",
    "clip_vit_l_14_pretrain_8gpu_h200_bf16",
)


def _count_parameters(rank):
    from megatron_mosaic.host.cpu import run_on_cpu

    run_on_cpu()
    from megatron.core import parallel_state

    from megatron_mosaic.recipes.specs import language_spec, vision_spec

    parallel_state.initialize_model_parallel()
    counts = {}
    for name in NAMES:
        model = RECIPES[name].spec()
        vision = vision_spec(model.modules["vision"]).submodules
        specs = [*vision["encoders"].values(), *vision["input_projections"]]
        counts[name] = {
            "language": _built(language_spec(model)),
            "vision": sum(_built(spec) for spec in specs),
        }
    return counts


def _built(spec):
    from megatron.core.transformer.spec_utils import build_module

    for key in ("config", "transformer_config"):
        if key in spec.params:
            spec.params[key].use_cpu_initialization = True
            spec.params[key].perform_initialization = False
    with torch.device("meta"):
        module = build_module(spec)
    return sum(parameter.numel() for parameter in module.parameters())


def test_models_have_the_parameters_of_their_files():
    (counts,) = run_ranks(_count_parameters, 1)
    llava, omni, clip = (counts[name] for name in NAMES)
    files = [RECIPES[name].spec().modules for name in NAMES]
    expected = [
        {part: module_parameters(modules[part]).dense for part in ("language", "vision")}
        for modules in files
    ]

    # LLaVA-1.5-7B: Vicuna's 6,738,415,616 and 64 image and padding rows of 4096, in and out, and
    # those that pad 32,064 to 32,128.
    assert llava["language"] == 6_738_415_616 + 2 * 128 * 4096
    assert [llava, omni] == expected[:2]
    # Megatron's CLIP has no norm after its last layer, and the projection of the text tower is
    # the forward step's.
    assert clip["vision"] == expected[2]["vision"] - 2 * 1024
    assert clip["language"] == expected[2]["language"] - 768 * 768
