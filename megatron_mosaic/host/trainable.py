"""What trains, in the plan's words, against what the script froze."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
import torch.distributed as dist

from megatron_mosaic.errors import PlanError
from megatron_mosaic.host.weights import global_named_parameters, tied_name
from megatron_mosaic.layout.placement import ModulePlacement

_LAYER = re.compile(r"^(.*\blayers\.)\d+\.(.*)$")
_WILDCARD = re.compile(r"[*?\[]")


def planned_names(
    module: torch.nn.Module, parts: Mapping[str, str]
) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Yields a module's parameters under the names that a plan knows.

    They are the global names, with the part's name in the plan instead of its place in the model:
    ``decoder.layers.3.mlp.linear_fc1.weight``.

    Args:
        module: The module, or the stage of it that this rank hosts.
        parts: Place in the model of each part.

    Note:
        The last stage's copy of tied embeddings has the name of the embedding.
    """
    for weight, _, parameter in global_named_parameters(module):
        name = tied_name(weight, parameter)
        for part, place in parts.items():
            if name.startswith(f"{place}."):
                name = part + name[len(place) :]
                break
        yield name, parameter


def selects(entry: str, name: str) -> bool:
    """Whether an entry of ``trainable`` means a parameter: its part, or a pattern on its name."""
    return name.startswith(f"{entry}.") or fnmatchcase(name, entry)


@dataclass(frozen=True, kw_only=True)
class TrainableStage:
    """What a rank found in its stage of a module.

    Args:
        module: Name of the module.
        stage: Its pipeline stage on this rank.
        parts: Parts that ``trainable`` may name.
        used: Entries of ``trainable`` that select a parameter here.
        num_trainable: Trainable weights by part, on this rank.
        num_weights: All weights by part, on this rank.
        layers: What trains in each layer: names inside it, beside the name of its block.
    """

    module: str
    stage: int
    parts: frozenset[str]
    used: frozenset[str]
    num_trainable: Mapping[str, int]
    num_weights: Mapping[str, int]
    layers: frozenset[tuple[str, frozenset[str]]]

    @property
    def trains(self) -> bool:
        """Whether any weight of the stage trains."""
        return any(self.num_trainable.values())


def check_trainable(
    module: torch.nn.Module, placement: ModulePlacement, *, parts: Mapping[str, str], stage: int
) -> TrainableStage:
    """Checks that the script froze what the plan says is frozen, parameter by parameter.

    Args:
        module: The stage of the module that this rank hosts.
        placement: Its placement.
        parts: Place in the model of each part that ``trainable`` may name.
        stage: The stage's number.

    Raises:
        PlanError: A parameter is trainable in one of the two only, or an entry begins with no
            part of the module.
    """
    where, listed = f"modules.{placement.name}", placement.trainable
    _check_parts(where, listed or (), parts)
    used: set[str] = set()
    num_trainable: dict[str, int] = {}
    num_weights: dict[str, int] = {}
    for name, parameter in planned_names(module, parts):
        entries = [entry for entry in listed or () if selects(entry, name)]
        used.update(entries)
        if parameter.requires_grad != (listed is None or bool(entries)):
            raise PlanError(
                f"{where}: trainable={'everything' if listed is None else list(listed)} must agree "
                f"with the script, which {'trains' if parameter.requires_grad else 'froze'} "
                f"{name!r}; change the plan or the script's freezing"
            )
        part = name.partition(".")[0]
        num_weights[part] = num_weights.get(part, 0) + parameter.numel()
        num_trainable[part] = num_trainable.get(part, 0) + (
            parameter.numel() if parameter.requires_grad else 0
        )
    return TrainableStage(
        module=placement.name,
        stage=stage,
        parts=frozenset(parts),
        used=frozenset(used),
        num_trainable=num_trainable,
        num_weights=num_weights,
        layers=_trained_in_layers(module, parts),
    )


def _trained_in_layers(
    module: torch.nn.Module, parts: Mapping[str, str]
) -> frozenset[tuple[str, frozenset[str]]]:
    layers: dict[str, tuple[str, set[str]]] = {}
    for name, parameter in planned_names(module, parts):
        match = _LAYER.match(name)
        if match:
            _, trained = layers.setdefault(name[: match.start(2)], (match[1], set()))
            trained.update([match[2]] if parameter.requires_grad else [])
    return frozenset((block, frozenset(trained)) for block, trained in layers.values())


def _check_parts(where: str, listed: Sequence[str], parts: Mapping[str, str]) -> None:
    """Refuses entries that select nothing in any model."""
    for entry in listed:
        part = entry.partition(".")[0]
        if part not in parts and not _WILDCARD.search(part):
            raise PlanError(
                f"{where}: trainable={list(listed)} must name parts out of {list(parts)}, or "
                f"patterns that begin with a part or a wildcard; remove {entry!r}"
            )


@dataclass(frozen=True, kw_only=True)
class Trainability:
    """What trains in each module, over all ranks.

    Args:
        stages: Pipeline stages with a trainable weight, ascending, by module.
        share: Part of the weights that trains, 0 to 1, by module and part.
        uneven: Modules in which not every layer of a block trains the same.
    """

    stages: Mapping[str, tuple[int, ...]]
    share: Mapping[str, Mapping[str, float]]
    uneven: frozenset[str]


def gather_trainability(
    own: Sequence[TrainableStage],
    placements: Mapping[str, ModulePlacement],
    *,
    group: dist.ProcessGroup,
) -> Trainability:
    """Puts together what all ranks found.

    Args:
        own: This rank's stages.
        placements: Modules by name.
        group: Group of the world for objects of the host.

    Raises:
        PlanError: A pattern in ``trainable`` selects no parameter; on every rank.

    Note:
        Collective over the world.
    """
    every: list[Sequence[TrainableStage]] = [()] * dist.get_world_size()
    dist.all_gather_object(every, list(own), group=group)
    found = [stage for stages in every for stage in stages]
    for name, placement in placements.items():
        # A part may be empty, as the output layer with tied embeddings is.
        used = {entry for each in found if each.module == name for entry in each.used | each.parts}
        unused = [entry for entry in placement.trainable or () if entry not in used]
        if unused:
            raise PlanError(
                f"modules.{name}: trainable={list(placement.trainable or ())} must select "
                f"parameters of the model, and {unused} select none; remove or correct them"
            )
    return Trainability(
        stages={
            name: tuple(sorted({s.stage for s in found if s.module == name and s.trains}))
            for name in placements
        },
        share={name: _shares([s for s in found if s.module == name]) for name in placements},
        uneven=frozenset(name for name in placements if _is_uneven(found, name)),
    )


def _is_uneven(stages: Sequence[TrainableStage], module: str) -> bool:
    layers = {layer for stage in stages if stage.module == module for layer in stage.layers}
    return len(layers) > len({block for block, _ in layers})


def _shares(stages: Sequence[TrainableStage]) -> dict[str, float]:
    """Part of the weights that trains; ranks count alike, so replicas do not change it."""
    total: dict[str, int] = {}
    trainable: dict[str, int] = {}
    for stage in stages:
        for part, number in stage.num_weights.items():
            total[part] = total.get(part, 0) + number
            trainable[part] = trainable.get(part, 0) + stage.num_trainable[part]
    return {part: trainable[part] / number for part, number in total.items() if number}
