"""Whether a plan can load a checkpoint, told from the checkpoint's index alone."""

import argparse
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from megatron_mosaic.errors import LayoutError, PlanError
from megatron_mosaic.host.checkpoint_files import (
    Iteration,
    find_short_file,
    folder_of,
    is_tracked,
    items_of,
    iterations_to_try,
    read_index,
)
from megatron_mosaic.layout.model_facts import ModuleFacts, check_module
from megatron_mosaic.layout.placement import LANGUAGE, ModulePlacement
from megatron_mosaic.layout.plan import Plan

_LAYER = re.compile(r"^(?P<block>.+\.layers)\.(?:(?P<number>\d+)\.)?(?P<weight>.+)$")
_STATE = re.compile(r"^optimizer\.state\.\w+\.(?P<weight>.+)$")
# Where a LLaVAModel keeps its vision half; all else of it is language.
_LLAVA_VISION = ("vision_model.", "vision_projection.")
_MODALITY = "modality_submodules."


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What a run under the plan would find in the checkpoint.

    Args:
        problems: Why it cannot be loaded, a line each; empty if it can.
        notes: What will be loaded, and what not.
    """

    problems: tuple[str, ...]
    notes: tuple[str, ...]


def check_checkpoint(checkpoints: Path, plan: Plan) -> Verdict:
    """Checks the checkpoint that a run under a plan would load.

    Only a run reads the files whole and compares their checksums.

    Args:
        checkpoints: Folder that Megatron saved into.
        plan: The plan.

    Raises:
        PlanError: There is no complete checkpoint in the folder.
    """
    iteration, index, passed_over = _find_complete(checkpoints)
    folder = folder_of(checkpoints, iteration)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is one process is meant
        common = dist_checkpointing.load_common_state_dict(str(folder))
    saved = common.get("args") or argparse.Namespace()
    place = f"iteration {iteration} of {checkpoints}"
    weights = _weights_of_modules(index, plan)
    problems = [
        *_check_names(weights, index, plan, place=place),
        *_check_sizes(weights, saved, plan),
        *_check_optimizer(weights, index, common, plan, place=place),
    ]
    notes = [*passed_over, f"checkpoint: {place}"]
    notes += _told_of(saved, plan, fits=not problems)
    return Verdict(problems=tuple(problems), notes=tuple(notes))


def _find_complete(checkpoints: Path) -> tuple[Iteration, Metadata, list[str]]:
    if not is_tracked(checkpoints):
        raise PlanError(
            f"checkpoint: folder={checkpoints} must hold latest_checkpointed_iteration.txt, which "
            f"Megatron writes; give the folder that --save named"
        )
    passed_over: list[str] = []
    for iteration in iterations_to_try(checkpoints):
        folder = folder_of(checkpoints, iteration)
        try:
            index = read_index(folder)
            reason = find_short_file(folder, items_of(index))
        except ValueError as error:
            index, reason = None, str(error)
        if index is not None and reason is None:
            return iteration, index, passed_over
        passed_over.append(f"iteration {iteration} is passed over: {reason}")
    shown = "; ".join(passed_over) or "there is none"
    raise PlanError(
        f"checkpoint: folder={checkpoints} must hold a complete checkpoint, but {shown}; give "
        f"another folder"
    )


def _weights_of_modules(index: Metadata, plan: Plan) -> dict[str, dict[str, tuple[int, ...]]]:
    """Shapes of the weights by name, of every module of the plan."""
    shapes = {
        name: tuple(entry.size)
        for name, entry in index.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata) and not name.startswith("optimizer.")
    }
    owners: dict[str, dict[str, tuple[int, ...]]] = {name: {} for name in plan.modules}
    for name, shape in shapes.items():
        owners.setdefault(_owner_of(name, plan), {})[name] = shape
    return owners


def _owner_of(weight: str, plan: Plan) -> str:
    """Module of the plan to which a weight belongs, or the name that it ought to have."""
    if weight.startswith(_LLAVA_VISION):
        return "vision"
    if not weight.startswith(_MODALITY):
        return LANGUAGE
    modality, part, encoder, *_ = weight.removeprefix(_MODALITY).split(".")
    if modality in plan.modules:
        return modality
    if any(name.startswith(f"{modality}_") for name in plan.modules):
        # Encoders of their own; the projection behind them is the language model's.
        return f"{modality}_{encoder}" if part == "encoders" else LANGUAGE
    return modality


def _check_names(
    weights: Mapping[str, Mapping[str, Any]], index: Metadata, plan: Plan, *, place: str
) -> Iterator[str]:
    there = sorted(name for name, found in weights.items() if found)
    for name in plan.modules:
        if not weights[name]:
            yield (
                f"modules.{name}: weights=0 in {place} must be above 0; it has modules {there}, "
                f"rename the module or give a checkpoint of this model"
            )
    for name in there:
        if name not in plan.modules:
            yield (
                f"modules: names={sorted(plan.modules)} must include {name}, which {place} has; "
                f"add it to the plan"
            )


def _check_sizes(
    weights: Mapping[str, Mapping[str, tuple[int, ...]]], saved: argparse.Namespace, plan: Plan
) -> Iterator[str]:
    for name, placement in plan.modules.items():
        for num_layers in sorted(set(_layers_of_blocks(weights[name]).values())):
            try:
                check_module(placement, _facts(placement, weights[name], num_layers, saved))
            except LayoutError as error:
                yield str(error)


def _layers_of_blocks(weights: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """Layers of every block: weights of all are one stack, or each has a number."""
    layers: dict[str, int] = {}
    for name, shape in weights.items():
        if match := _LAYER.match(name):
            number = match["number"]
            count = shape[0] if number is None else int(number) + 1
            layers[match["block"]] = max(layers.get(match["block"], 0), count)
    return layers


def _facts(
    placement: ModulePlacement,
    weights: Mapping[str, tuple[int, ...]],
    num_layers: int,
    saved: argparse.Namespace,
) -> ModuleFacts:
    tp = placement.tensor_model_parallel_size
    widths = [shape for name, shape in weights.items() if name.endswith("mlp.linear_fc2.weight")]
    ffn_hidden_size, hidden_size = (widths[0][-1], widths[0][-2]) if widths else (tp, tp)
    is_language = placement.name == LANGUAGE
    # Megatron keeps the language model's arguments; heads of others do not show in their weights.
    heads = getattr(saved, "num_attention_heads", tp) if is_language else tp
    grouped = is_language and getattr(saved, "group_query_attention", False)
    return ModuleFacts(
        num_layers=num_layers,
        num_attention_heads=heads,
        num_query_groups=saved.num_query_groups if grouped else heads,
        hidden_size=hidden_size,
        ffn_hidden_size=ffn_hidden_size,
        num_experts=getattr(saved, "num_experts", None) if is_language else None,
    )


def _check_optimizer(
    weights: Mapping[str, Mapping[str, Any]],
    index: Metadata,
    common: dict[str, Any],
    plan: Plan,
    *,
    place: str,
) -> Iterator[str]:
    kind = (common.get("content_metadata") or {}).get("distrib_optim_sharding_type")
    if kind is not None and kind not in DistributedOptimizer.checkpoint_fully_reshardable_formats:
        yield (
            f"checkpoint: distrib_optim_sharding_type={kind} in {place} must be fully_reshardable, "
            f"for only its own layout can read it; save once more with "
            f"--dist-ckpt-optim-fully-reshardable, or load with --no-load-optim"
        )
        return
    matches = map(_STATE.match, index.state_dict_metadata)
    with_states = {match["weight"] for match in matches if match}
    for name, placement in plan.modules.items():
        trains = placement.trainable is None or placement.trainable
        if trains and weights[name] and not with_states & weights[name].keys():
            yield (
                f"modules.{name}: trainable={placement.trainable} must be [], as in {place}, which "
                f"has no optimizer states of it; set trainable: [] or load with --no-load-optim"
            )


def _told_of(saved: argparse.Namespace, plan: Plan, *, fits: bool) -> Iterator[str]:
    """What will be loaded, and what will start afresh."""
    digest = getattr(saved, "mosaic_plan_digest", None)
    by = f"plan {digest[:12]}" if digest else "a run without a plan"
    world_size = getattr(saved, "world_size", None)
    samples = getattr(saved, "consumed_train_samples", 0)
    yield f"saved by {by} on {world_size} ranks, after {samples} samples"
    if not fits:
        return
    yield "weights, optimizer states, schedule of the learning rate and samples will be loaded"
    if digest != plan.digest():
        yield "random states will start afresh, for they are those of another layout"
