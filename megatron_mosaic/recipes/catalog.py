"""The recipes as data: what each trains, on what, and where the plan that it carries lies."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from megatron_mosaic.cluster.shipped import load_cluster, resized
from megatron_mosaic.errors import PlanError
from megatron_mosaic.fields import nearest
from megatron_mosaic.layout.plan import Plan
from megatron_mosaic.model.shipped import load_model
from megatron_mosaic.model.spec import ModelSpec
from megatron_mosaic.planner.planner import inputs_of, make_plan
from megatron_mosaic.planner.problem import Problem, read_pins

PLANS = Path(__file__).with_name("plans")
SUFFIX = "_mosaic_config"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a recipe trains, on what.

    Args:
        model_name: A shipped model, in the name of the recipe's function.
        model: Name of the model's file.
        task: ``pretrain`` or ``sft``.
        num_gpus: GPUs of the run.
        gpu: A shipped cluster.
        global_batch_size: Samples of a step.
        variant: What tells recipes of the same model, task and GPUs from each other.
        pins: Fields of the plan that are fixed, as ``megatron-mosaic plan --set`` takes them.
    """

    model_name: str
    model: str
    task: str
    num_gpus: int
    gpu: str
    global_batch_size: int
    variant: str = ""
    pins: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The name of its function, without what all of them end with.

        Source:
            Megatron-Bridge 0.6.2, recipes: model, task, GPUs, GPU, precision, variant.
        """
        words = (self.model_name, self.task, f"{self.num_gpus}gpu", self.gpu, "bf16", self.variant)
        return "_".join(word for word in words if word)

    @property
    def plan_path(self) -> Path:
        """Where its plan lies."""
        return PLANS / f"{self.name}.yaml"

    def plan(self) -> Plan:
        """Reads its plan."""
        return Plan.load(self.plan_path)

    def spec(self) -> ModelSpec:
        """Reads its model."""
        return load_model(self.model)

    def problem(self) -> Problem:
        """What the planner is asked for its plan."""
        model = self.spec()
        return Problem(
            model=model,
            cluster=resized(load_cluster(self.gpu), num_gpus=self.num_gpus),
            num_gpus=self.num_gpus,
            global_batch_size=self.global_batch_size,
            pins=read_pins(self.pins, model=model),
        )

    def made_plan(self) -> Plan:
        """Makes its plan anew; without a time limit, so that every machine makes the same."""
        return make_plan(self.problem()).plan()

    def is_current(self) -> bool:
        """Whether its plan was made from the model, cluster and settings as they are now."""
        return self.plan().inputs == inputs_of(self.problem())


# What Megatron-Bridge's own loop can run: modules side by side, without sequence and context
# parallelism or recomputation.
_OF_BRIDGE: Mapping[str, str] = {
    "placement": "disjoint",
    "schedule.kind": "1f1b",
    "language.context_parallel_size": "1",
    "language.sequence_parallel": "false",
    "language.recompute": "none",
    "vision.context_parallel_size": "1",
    "vision.recompute": "none",
    "vision.sequence_parallel": "false",
    # Half of the GPUs each, so that either data-parallel size divides the other.
    "language.data_parallel_size": "4",
    "vision.data_parallel_size": "4",
}

_RECIPES = (
    Recipe(
        model_name="llava_15_7b",
        model="llava-1.5-7b",
        task="sft",
        num_gpus=8,
        gpu="h100",
        global_batch_size=256,
    ),
    Recipe(
        model_name="llava_15_7b",
        model="llava-1.5-7b",
        task="sft",
        num_gpus=8,
        gpu="h100",
        global_batch_size=256,
        variant="disjoint",
        pins=_OF_BRIDGE,
    ),
    Recipe(
        model_name="qwen25_vl_7b",
        model="qwen2.5-vl-7b",
        task="pretrain",
        num_gpus=16,
        gpu="h100",
        global_batch_size=128,
    ),
    Recipe(
        model_name="qwen3_vl_30b_a3b",
        model="qwen3-vl-30b-a3b",
        task="pretrain",
        num_gpus=32,
        gpu="h100",
        global_batch_size=256,
    ),
    # The audio tower is one of transformers, which does not split it.
    Recipe(
        model_name="siglip_whisper_mistral_7b",
        model="cornstarch-s",
        task="pretrain",
        num_gpus=16,
        gpu="h100",
        global_batch_size=128,
        pins={"audio.tensor_model_parallel_size": "1"},
    ),
    Recipe(
        model_name="clip_vit_l_14",
        model="clip-vit-l-14",
        task="pretrain",
        num_gpus=8,
        gpu="h200",
        global_batch_size=4096,
    ),
)

RECIPES: Mapping[str, Recipe] = {recipe.name: recipe for recipe in _RECIPES}


def find_recipe(name: str) -> Recipe:
    """Finds a recipe by its name, with or without what the functions' names end with.

    Raises:
        PlanError: There is none of this name.
    """
    short = name.removesuffix(SUFFIX)
    if short not in RECIPES:
        raise PlanError(
            f"recipes: name={name} must be one of {', '.join(RECIPES)}; "
            f"{nearest(short, tuple(RECIPES), otherwise='choose one of them')}"
        )
    return RECIPES[short]
