"""Recipes without Megatron-Bridge: their plans, their models' numbers, and their arguments."""

import importlib.util
import inspect
import re
import subprocess
import sys
from itertools import pairwise

import pytest

import megatron_mosaic.recipes
from megatron_mosaic.errors import HostError, PlanError
from megatron_mosaic.planner.emit.emission import Launch
from megatron_mosaic.planner.emit.formats import emit
from megatron_mosaic.recipes.catalog import PLANS, RECIPES, SUFFIX, find_recipe
from megatron_mosaic.recipes.language_geometry import arguments_of
from megatron_mosaic.schedule.build import build_schedule
from megatron_mosaic.schedule.verify import verify

FUNCTIONS = {
    name.removesuffix(SUFFIX): function
    for name, function in inspect.getmembers(megatron_mosaic.recipes, inspect.isfunction)
    if name.endswith(SUFFIX)
}


def test_each_recipe_has_a_function_and_a_plan():
    assert set(FUNCTIONS) == set(RECIPES)
    assert {path.stem for path in PLANS.glob("*.yaml")} == set(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_is_named_and_called_as_in_bridge(name):
    named = re.fullmatch(r"[a-z0-9_]+_(pretrain|sft)_(\d+)gpu_[a-z0-9]+_bf16(_[a-z]+)?", name)

    assert named is not None
    assert not inspect.signature(FUNCTIONS[name]).parameters
    assert int(named[2]) == RECIPES[name].plan().world_size


@pytest.mark.parametrize("name", RECIPES)
def test_plan_is_made_from_the_inputs_of_today(name):
    recipe = RECIPES[name]

    assert recipe.is_current(), "run 'python -m tools.regenerate_recipes'"


@pytest.mark.parametrize(
    "name", ["llava_15_7b_sft_8gpu_h100_bf16", "llava_15_7b_sft_8gpu_h100_bf16_disjoint"]
)
def test_plan_is_what_the_planner_gives(name):
    # The others take longer: 'python -m tools.regenerate_recipes --check' makes them all.
    assert RECIPES[name].made_plan().to_yaml() == RECIPES[name].plan_path.read_text()


@pytest.mark.parametrize("name", RECIPES)
def test_plan_has_a_schedule_that_works_and_fits(name):
    plan = RECIPES[name].plan()
    verify(plan, build_schedule(plan))
    predicted = plan.predicted or {}

    assert predicted["peak_bytes"] <= predicted["capacity_bytes"]
    assert plan.global_batch_size == RECIPES[name].global_batch_size


@pytest.mark.parametrize("name", [name for name in RECIPES if "disjoint" not in name])
def test_plan_is_not_slower_than_the_homogeneous_one(name):
    predicted = RECIPES[name].plan().predicted or {}

    assert predicted["step_s"] <= predicted["baseline"]["step_s"]


@pytest.mark.parametrize("name", RECIPES)
def test_plan_can_be_launched_by_slurm(name):
    launch = Launch(plan_path="plan.yaml", script="train.py", gpus_per_node=8)
    nodes = RECIPES[name].num_gpus // 8

    assert (
        f"#SBATCH --nodes={nodes}\n" in emit(RECIPES[name].plan(), form="slurm", launch=launch).text
    )


def test_arguments_are_those_of_the_published_model():
    words = arguments_of(RECIPES["qwen3_vl_30b_a3b_pretrain_32gpu_h100_bf16"])
    options = dict(pairwise(words))

    # The model's config.json: 48 layers of 2048, 32 heads of 128 in 4 groups, 128 experts of 768.
    assert options["--num-layers"] == "48"
    assert options["--hidden-size"] == "2048"
    assert options["--num-attention-heads"] == "32"
    assert options["--kv-channels"] == "128"
    assert options["--num-query-groups"] == "4"
    assert options["--num-experts"] == "128"
    assert options["--moe-router-topk"] == "8"
    assert options["--moe-ffn-hidden-size"] == "768"
    assert options["--mosaic-plan"].endswith("qwen3_vl_30b_a3b_pretrain_32gpu_h100_bf16.yaml")
    assert {"--swiglu", "--qk-layernorm", "--disable-bias-linear"} <= set(words)


@pytest.mark.parametrize("name", RECIPES)
def test_arguments_are_of_the_plans_batch_and_leave_parallel_sizes_to_it(name):
    words = arguments_of(RECIPES[name])
    options = dict(pairwise(words))

    assert options["--micro-batch-size"] == str(RECIPES[name].plan().micro_batch_size)
    assert options["--global-batch-size"] == str(RECIPES[name].global_batch_size)
    assert not [word for word in words if "parallel-size" in word]


@pytest.mark.skipif(
    importlib.util.find_spec("megatron.bridge") is not None, reason="megatron-bridge is installed"
)
@pytest.mark.parametrize("name", RECIPES)
def test_recipe_says_what_to_install(name):
    with pytest.raises(
        HostError, match=r"must be installed .*; run 'pip install \"megatron-mosaic"
    ):
        FUNCTIONS[name]()


def test_import_needs_neither_bridge_nor_torch():
    code = "import sys, megatron_mosaic.recipes; print(*sys.modules)"
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )

    assert not {"torch", "megatron", "nemo_run"} & set(process.stdout.split())


def test_unknown_recipe_gets_the_nearest_name():
    with pytest.raises(
        PlanError, match=r"name=llava_15_7b_sft_8gpu_h200_bf16 must be one of .*h100"
    ):
        find_recipe("llava_15_7b_sft_8gpu_h200_bf16")
