"""Recipes with Megatron-Bridge itself: its configurations, and its own validation of them."""

import importlib.util
import json

import pytest

from megatron_mosaic.errors import HostError, LayoutError, PlanError
from megatron_mosaic.layout.plan import Plan
from megatron_mosaic.recipes import catalog, configs
from tests.model.test_huggingface import QWEN3_VL, QWEN25_VL
from tests.planner.emitted import DISJOINT, HOMOGENEOUS
from tests.recipes.without_transformer_engine import stand_in_where_it_is_missing

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("megatron.bridge") is None,
        reason="megatron-bridge is not installed: pip install megatron-mosaic[bridge]",
    ),
    # Bridge's and transformers' own.
    pytest.mark.filterwarnings("ignore"),
]

MIMO = [name for name, recipe in catalog.RECIPES.items() if recipe.model not in configs.HUB_NAMES]
HUGGING_FACE = {
    "qwen25_vl_7b_pretrain_16gpu_h100_bf16": ("Qwen2_5_VLForConditionalGeneration", QWEN25_VL),
    "qwen3_vl_30b_a3b_pretrain_32gpu_h100_bf16": (
        "Qwen3VLMoeForConditionalGeneration",
        QWEN3_VL,
    ),
}


@pytest.fixture(scope="module", autouse=True)
def bridge():
    if importlib.util.find_spec("megatron.bridge") is not None:
        stand_in_where_it_is_missing()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A cache of Hugging Face's hub with the models' public configurations."""
    for name, (architecture, config) in HUGGING_FACE.items():
        hub_name = configs.HUB_NAMES[catalog.RECIPES[name].model]
        folder = tmp_path / f"models--{hub_name.replace('/', '--')}"
        (folder / "refs").mkdir(parents=True)
        (folder / "refs" / "main").write_text("0" * 40)
        (folder / "snapshots" / ("0" * 40)).mkdir(parents=True)
        written = {"architectures": [architecture], **config}
        (folder / "snapshots" / ("0" * 40) / "config.json").write_text(json.dumps(written))
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


@pytest.mark.parametrize("name", MIMO)
def test_config_of_specs_passes_bridges_validation(name):
    from megatron.bridge.training.config import megatron_mimo_runtime_config_update

    cfg = configs.config_of(name)
    megatron_mimo_runtime_config_update(cfg)
    plan = catalog.RECIPES[name].plan()

    assert cfg.model.plan().digest() == plan.digest()
    assert cfg.train.global_batch_size == plan.global_batch_size
    assert set(cfg.model.modality_submodules_spec) == set(plan.encoders)


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_config_of_hugging_face_has_the_numbers_of_the_model_and_the_plan(hub, name):
    cfg = configs.config_of(name)
    recipe = catalog.RECIPES[name]
    language, sizes = recipe.plan().language, recipe.spec().language
    # Of Transformer Engine, which this machine need not have.
    cfg.model.moe_permute_fusion = False
    cfg.model.finalize()

    assert cfg.model.hidden_size == sizes.hidden_size
    assert cfg.model.num_layers == sizes.num_layers
    assert cfg.model.context_parallel_size == language.context_parallel_size
    assert cfg.model.expert_model_parallel_size == language.expert_model_parallel_size
    assert cfg.model.plan().digest() == recipe.plan().digest()


def test_disjoint_recipe_is_parallel_in_bridge_as_in_the_plan():
    cfg = configs.config_of("llava_15_7b_sft_8gpu_h100_bf16_disjoint")
    parallelism = cfg.model.megatron_mimo_parallelism_config
    parallelism.finalize(8)
    cfg.model.check(micro_batch_size=8, global_batch_size=256)

    assert parallelism.total_world_size == 8
    assert parallelism.get_parallelism("vision").rank_offset == 4
    # 2 samples of each of the language model's 4 replicas.
    assert cfg.train.micro_batch_size == 8


def test_changed_parallelism_is_not_the_plans():
    cfg = configs.config_of("llava_15_7b_sft_8gpu_h100_bf16_disjoint")
    language = cfg.model.megatron_mimo_parallelism_config.module_parallelisms["language"]
    language.tensor_model_parallel_size, language.data_parallel_size = 2, 2

    with pytest.raises(LayoutError, match=r"model: module_parallelisms=language must equal .*yaml"):
        cfg.model.check(micro_batch_size=8, global_batch_size=256)


def test_bridges_loop_refuses_a_plan_that_it_cannot_run():
    cfg = configs.config_of("llava_15_7b_sft_8gpu_h100_bf16")

    assert cfg.model.megatron_mimo_parallelism_config is None
    with pytest.raises(HostError, match=r"must be 8-15.* in Megatron-Bridge's loop; run it with"):
        cfg.model.provide_distributed_model(wrap_with_ddp=False)


def test_plan_returns_from_bridge():
    from megatron_mosaic.recipes.bridge import from_bridge, to_bridge

    plan = Plan.loads(DISJOINT, where="plan.yaml")

    # 2 samples of each of 2 replicas.
    assert from_bridge(to_bridge(plan), micro_batch_size=4, global_batch_size=64) == plan


def test_bridge_refuses_shared_ranks():
    from megatron_mosaic.recipes.bridge import to_bridge

    with pytest.raises(PlanError, match=r"ranks=0-3 must be 8-11.* for Megatron-Bridge; run the"):
        to_bridge(Plan.loads(HOMOGENEOUS, where="plan.yaml"))


def test_whisper_gives_its_last_hidden_states():
    import torch

    from megatron_mosaic.recipes.whisper import WhisperTower

    sizes = {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 2, "ffn_hidden_size": 16}
    tower = WhisperTower(**sizes)

    # 30 seconds of 100 frames, halved by the second convolution.
    assert tower(torch.zeros(2, 80, 3000)).shape == (2, 1500, 8)
