"""The plan file: YAML to checked fields and back, without judging what they mean together."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import yaml

from megatron_mosaic.errors import LayoutError, PlanError
from megatron_mosaic.fields import (
    Parse,
    boolean,
    check_format,
    integer,
    integers,
    mapping,
    names,
    pairs,
    parse_yaml,
    read_keys,
    show,
    text,
)
from megatron_mosaic.layout.attention import AttentionPlan
from megatron_mosaic.layout.placement import ModulePlacement
from megatron_mosaic.layout.ranks import parse_ranks, rank_spans
from megatron_mosaic.layout.share import Share

FORMAT = 1

_PLAN_KEYS: Mapping[str, Parse] = {
    "format": integer,
    "world_size": integer,
    "global_batch_size": integer,
    "micro_batch_size": integer,
    "modules": mapping,
    "edges": pairs,
    "schedule": mapping,
    "predicted": mapping,
    "inputs": mapping,
}
_REQUIRED_PLAN_KEYS = ("world_size", "global_batch_size", "micro_batch_size", "modules", "schedule")
_ATTENTION_KEYS: Mapping[str, Parse] = {"mask": text, "tokens": text, "keys": text}


def _attention(field: str, value: object) -> AttentionPlan:
    """Reads how the language model attends."""
    keys = read_keys(f"{field}.", mapping(field, value), known=_ATTENTION_KEYS, required=("mask",))
    try:
        return AttentionPlan(**keys)
    except PlanError as error:
        raise PlanError(f"{field.removesuffix('attention')}{error}") from None


def _share(field: str, value: object) -> Share:
    """Reads a quota."""
    keys = read_keys(f"{field}.", mapping(field, value), known={"sms": integer}, required=("sms",))
    try:
        return Share(**keys)
    except LayoutError as error:
        raise LayoutError(f"{field.removesuffix('share')}{error}") from None


_MODULE_KEYS: Mapping[str, Parse] = {
    "ranks": parse_ranks,
    "tensor_model_parallel_size": integer,
    "context_parallel_size": integer,
    "data_parallel_size": integer,
    "pipeline_model_parallel_size": integer,
    "virtual_pipeline_model_parallel_size": integer,
    "sequence_parallel": boolean,
    "trainable": names,
    "layers_per_stage": integers,
    "expert_model_parallel_size": integer,
    "expert_tensor_parallel_size": integer,
    "recompute": text,
    "attention": _attention,
    "items": text,
    "share": _share,
}


def _task_lists(field: str, value: object) -> tuple[tuple[str, str], ...]:
    """Reads the tasks of each kind of ranks, in any order of the kinds."""
    lists = mapping(field, value)
    return tuple(
        sorted(
            (text(f"{field} key", ranks), text(f"{field}[{ranks}]", lists[ranks]))
            for ranks in lists
        )
    )


_SCHEDULE_KEYS: Mapping[str, Parse] = {
    "kind": text,
    "encoder_group": integer,
    "max_live": integer,
    "ahead": boolean,
    "order": _task_lists,
}


class _OnePerLine(dict[str, str]):
    """A mapping that is written with one entry on a line."""


class _Dumper(yaml.SafeDumper):
    """Writes plain values."""


_Dumper.add_representer(
    _OnePerLine,
    lambda dumper, lists: dumper.represent_mapping(
        "tag:yaml.org,2002:map", lists.items(), flow_style=False
    ),
)


def read_plan_fields(source: str) -> dict[str, Any]:
    """Reads the arguments of a ``Plan`` from YAML; the schedule is still a mapping.

    Raises:
        PlanError: The text is no YAML, or has an unknown, missing or mistyped key.
        LayoutError: A module contradicts itself.
    """
    return plan_fields(mapping("plan", parse_yaml(source)))


def plan_fields(document: Mapping[Any, Any]) -> dict[str, Any]:
    """Reads the same from a mapping, as YAML gives it.

    Raises:
        PlanError: A key is unknown, missing or mistyped.
        LayoutError: A module contradicts itself.
    """
    check_format("", document, known=FORMAT)
    plan = read_keys("", document, known=_PLAN_KEYS, required=_REQUIRED_PLAN_KEYS)
    del plan["format"]
    plan["modules"] = {name: _read_module(name, module) for name, module in plan["modules"].items()}
    plan["schedule"] = read_keys(
        "schedule: ", plan["schedule"], known=_SCHEDULE_KEYS, required=("kind",)
    )
    return plan


def write_plan_fields(plan: Mapping[str, Any]) -> str:
    """Writes the arguments of a ``Plan`` as YAML that ``read_plan_fields`` gives back."""
    document = {"format": FORMAT, **plan, "modules": written_modules(plan["modules"])}
    if "order" in document["schedule"]:
        lists = _OnePerLine(plan["schedule"]["order"])
        document["schedule"] = {**document["schedule"], "order": lists}
    return yaml.dump(document, Dumper=_Dumper, sort_keys=False, default_flow_style=None, width=100)


def _read_module(name: Any, module: Any) -> ModulePlacement:
    if not isinstance(name, str) or not name.isidentifier():
        raise PlanError(
            f"modules: name={show(name)} must be letters, digits and underscores; rename the module"
        )
    where = f"modules.{name}"
    written = read_keys(
        f"{where}: ", mapping(where, module), known=_MODULE_KEYS, required=("ranks",)
    )
    return ModulePlacement(name=name, **written)


def written_modules(modules: Mapping[str, ModulePlacement]) -> dict[str, Any]:
    """Placements as the file has them: ranks as spans, keys with default values left out."""
    return {name: _written_module(placement) for name, placement in modules.items()}


def _written_module(placement: ModulePlacement) -> dict[str, Any]:
    written: dict[str, Any] = {"ranks": rank_spans(placement.ranks)}
    for field in fields(placement):
        value = getattr(placement, field.name)
        if field.name not in ("name", "ranks") and value != field.default:
            written[field.name] = _written_value(value)
    return written


def _written_value(value: object) -> object:
    if isinstance(value, AttentionPlan | Share):
        return value.written()
    return list(value) if isinstance(value, tuple) else value
