"""LLaVAModel, the model of ``pretrain_vlm.py``, as two modules with layouts of their own.

Upstream's class can build either half: the vision encoder with its projector, or the language
model. Scripts ask for both, so while a module is built the constructor gets the half's flags.
"""

import copy
import functools
import inspect
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.models.multimodal.llava_model import LLaVAModel
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import unwrap_model

from megatron_mosaic.errors import HostError, PlanError
from megatron_mosaic.host.data.batches import batch_fields, is_absent
from megatron_mosaic.host.data.facts import SampleFacts
from megatron_mosaic.host.groups import ModuleGroups
from megatron_mosaic.layout.placement import ModulePlacement

VISION, LANGUAGE = "vision", "language"

# Where a part of the plan's ``trainable`` lies in the model.
PARTS: Mapping[str, Mapping[str, str]] = {
    VISION: {"encoder": "vision_model", "projector": "vision_projection"},
    LANGUAGE: {
        "embedding": "language_model.embedding",
        "decoder": "language_model.decoder",
        "output_layer": "language_model.output_layer",
    },
}

# Names under which scripts keep a batch's token ids, and what it has one row of for each image.
TOKEN_KEYS = ("tokens", "input_ids")
IMAGE_KEYS = ("image", "images", "imgs")
PER_IMAGE_KEYS = (*IMAGE_KEYS, "num_tiles")


def check_modules(names: list[str]) -> None:
    """Checks that a plan names the modules that the model has.

    Raises:
        PlanError: There is another module, or one is missing.
    """
    if sorted(names) != sorted((VISION, LANGUAGE)):
        raise PlanError(
            f"modules: names={sorted(names)} must be {sorted((VISION, LANGUAGE))} for LLaVAModel; "
            f"rename the modules of the plan"
        )


@contextmanager
def building_one_module(groups: ModuleGroups) -> Iterator[None]:
    """Makes LLaVAModel build one module only, on that module's groups and sizes.

    ``pretrain_vlm.py`` hard-codes ``add_decoder=True`` and gives both halves the language
    model's sizes; there is no argument through which a launcher could say otherwise.
    """
    original = LLaVAModel.__init__
    signature = inspect.signature(original)

    @functools.wraps(original)
    def build_half(self: LLaVAModel, *args: Any, **kwargs: Any) -> None:
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        bound.arguments.update(_overrides(bound.arguments, groups))
        original(*bound.args, **bound.kwargs)

    LLaVAModel.__init__ = build_half
    try:
        yield
    finally:
        LLaVAModel.__init__ = original


def _overrides(arguments: Mapping[str, Any], groups: ModuleGroups) -> dict[str, Any]:
    placement = groups.placement
    common = {"pg_collection": groups.collection}
    if placement.name == LANGUAGE:
        config = _retarget(arguments["language_transformer_config"], placement)
        return common | {
            "language_transformer_config": config,
            "add_encoder": False,
            "add_decoder": True,
            "pre_process": groups.is_first_stage,
            "post_process": groups.is_last_stage,
        }
    vision = _retarget(arguments["vision_transformer_config"], placement)
    return common | {
        # The half's own config: DDP and the gradient rules read it from the model.
        "language_transformer_config": vision,
        "vision_transformer_config": vision,
        "vision_projection_config": _retarget(arguments["vision_projection_config"], placement),
        "add_encoder": True,
        "add_decoder": False,
        "pre_process": True,
        "post_process": True,
    }


def _retarget(config: TransformerConfig, placement: ModulePlacement) -> TransformerConfig:
    """Copies a config with the parallel sizes of a module."""
    config = copy.copy(config)
    stages = placement.pipeline_model_parallel_size
    config.tensor_model_parallel_size = placement.tensor_model_parallel_size
    config.context_parallel_size = placement.context_parallel_size
    config.pipeline_model_parallel_size = stages
    config.sequence_parallel = placement.sequence_parallel
    # The engine posts sends and goes on: an output must outlive its transfer.
    config.deallocate_pipeline_outputs = False
    config.pipeline_model_parallel_layout = None
    if placement.layers_per_stage is not None:
        rows = [["decoder"] * layers for layers in placement.layers_per_stage]
        rows[0].insert(0, "embedding")
        rows[-1].append("loss")
        config.pipeline_model_parallel_layout = PipelineParallelLayerLayout(rows, stages)
    if placement.name != LANGUAGE:
        # An encoder's gradient is a plain sum over its replicas; the engine scales it.
        config.calculate_per_token_loss = True
    return config


def trainable_parts(module: torch.nn.Module, name: str) -> dict[str, bool | None]:
    """Tells which parts that this rank holds are trainable; None means partly."""
    found: dict[str, bool | None] = {}
    for part, path in PARTS[name].items():
        node: Any = module
        for attribute in path.split("."):
            node = getattr(node, attribute, None)
        flags = {parameter.requires_grad for parameter in node.parameters()} if node else set()
        if flags:
            found[part] = flags.pop() if len(flags) == 1 else None
    return found


def check_trainable(module: torch.nn.Module, placement: ModulePlacement) -> None:
    """Checks that the script froze what the plan says is frozen.

    Raises:
        PlanError: A part is trainable in one of the two only, or the plan names no such part.
    """
    where = f"modules.{placement.name}"
    listed = placement.trainable
    unknown = sorted(set(listed or ()) - set(PARTS[placement.name]))
    if unknown:
        raise PlanError(
            f"{where}: trainable={list(listed or ())} must name parts out of "
            f"{list(PARTS[placement.name])}; remove {unknown}"
        )
    for part, trainable in trainable_parts(module, placement.name).items():
        wanted = listed is None or part in listed
        if trainable != wanted:
            state = {True: "trains", False: "froze", None: "trains only some weights of"}[trainable]
            raise PlanError(
                f"{where}: trainable={'everything' if listed is None else list(listed)} must agree "
                f"with the script, which {state} {part!r}; change the plan or the script's freezing"
            )


class LlavaBoundary:
    """Translates between LLaVA's tensors and boundary rows ``[tokens, h]``."""

    def __init__(self, model: torch.nn.Module) -> None:
        inner = unwrap_model(model)
        self.rows_per_image: int = inner.img_seq_len
        self.image_token: int = inner.image_token_index

    def rows_of(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Flattens image embeddings ``[rows, images, h]`` into ``[images * rows, h]``."""
        return embeddings.transpose(0, 1).reshape(-1, embeddings.shape[-1])

    def embeddings_of(self, rows: torch.Tensor) -> torch.Tensor:
        """Inverse of :meth:`rows_of`; no image gives LLaVA's empty ``[0, 0, h]``."""
        if rows.shape[0] == 0:
            return rows.reshape(0, 0, rows.shape[-1])
        images = rows.reshape(-1, self.rows_per_image, rows.shape[-1])
        return images.transpose(0, 1).contiguous()


def sample_facts(batch: Any, *, image_token: int) -> list[SampleFacts]:
    """Finds what all ranks must know of every sample of a batch.

    Args:
        batch: Mapping or dataclass of tensors on the host.
        image_token: Token id that stands for an image.

    Raises:
        HostError: The batch has no token ids under a known key, or another number of images.
    """
    fields = batch_fields(batch)
    tokens = next((fields[key] for key in TOKEN_KEYS if key in fields), None)
    if tokens is None:
        raise HostError(
            f"data: batch keys={sorted(fields)} must include one of {list(TOKEN_KEYS)}; "
            f"name the token ids so in the data set"
        )
    counts = (tokens == image_token).sum(dim=1).tolist()
    images = next((fields[key] for key in IMAGE_KEYS if key in fields), None)
    num_images = sum(counts) if images is None or is_absent(images) else images.shape[0]
    if num_images != sum(counts):
        raise HostError(
            f"data: images={num_images} must equal the image tokens={sum(counts)} of the "
            f"batch; give every image one token {image_token}"
        )
    return [
        SampleFacts(images=count, text_checksum=zlib.crc32(row.numpy().tobytes()))
        for count, row in zip(counts, tokens, strict=True)
    ]
