"""The plan file: YAML to checked fields and back, without judging what they mean together."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import yaml

from megatron_mosaic.errors import PlanError
from megatron_mosaic.fields import (
    Parse,
    boolean,
    integer,
    integers,
    mapping,
    names,
    nearest,
    pairs,
    show,
    text,
)
from megatron_mosaic.layout import unsupported
from megatron_mosaic.layout.placement import ModulePlacement
from megatron_mosaic.layout.ranks import parse_ranks, rank_spans

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
_MODULE_KEYS: Mapping[str, Parse] = {
    "ranks": parse_ranks,
    "tensor_model_parallel_size": integer,
    "context_parallel_size": integer,
    "data_parallel_size": integer,
    "pipeline_model_parallel_size": integer,
    "sequence_parallel": boolean,
    "trainable": names,
    "layers_per_stage": integers,
    "expert_model_parallel_size": integer,
    "expert_tensor_parallel_size": integer,
    "recompute": text,
}
_SCHEDULE_KEYS: Mapping[str, Parse] = {"kind": text, "encoder_group": integer}


def read_plan_fields(source: str) -> dict[str, Any]:
    """Reads the arguments of a ``Plan`` from YAML; the schedule is still a mapping.

    Raises:
        PlanError: The text is no YAML, or has an unknown, missing or mistyped key.
        LayoutError: A module contradicts itself.
    """
    document = mapping("plan", _parse_yaml(source))
    _check_format(document)
    plan = _read_keys("", document, known=_PLAN_KEYS, required=_REQUIRED_PLAN_KEYS)
    del plan["format"]
    plan["modules"] = {name: _read_module(name, module) for name, module in plan["modules"].items()}
    unsupported.refuse_later_keys("schedule", plan["schedule"], unsupported.LATER_SCHEDULE_KEYS)
    plan["schedule"] = _read_keys(
        "schedule: ", plan["schedule"], known=_SCHEDULE_KEYS, required=("kind",)
    )
    return plan


def write_plan_fields(plan: Mapping[str, Any]) -> str:
    """Writes the arguments of a ``Plan`` as YAML that ``read_plan_fields`` gives back."""
    document = {"format": FORMAT, **plan}
    document["modules"] = {
        name: _written_module(placement) for name, placement in plan["modules"].items()
    }
    return yaml.safe_dump(document, sort_keys=False, default_flow_style=None, width=100)


def _check_format(document: Mapping[Any, Any]) -> None:
    if "format" not in document:
        raise PlanError(f"format must be given; add the line 'format: {FORMAT}'")
    if integer("format", document["format"]) != FORMAT:
        raise PlanError(
            f"format={show(document['format'])} must be {FORMAT}, the one this version reads; "
            f"write the plan again with this version"
        )


def _read_module(name: Any, module: Any) -> ModulePlacement:
    if not isinstance(name, str) or not name.isidentifier():
        raise PlanError(
            f"modules: name={show(name)} must be letters, digits and underscores; rename the module"
        )
    where = f"modules.{name}"
    written = mapping(where, module)
    unsupported.refuse_later_keys(where, written, unsupported.LATER_MODULE_KEYS)
    return ModulePlacement(
        name=name, **_read_keys(f"{where}: ", written, known=_MODULE_KEYS, required=("ranks",))
    )


def _read_keys(
    where: str, written: Mapping[Any, Any], *, known: Mapping[str, Parse], required: tuple[str, ...]
) -> dict[str, Any]:
    for key in written:
        if key not in known:
            raise PlanError(
                f"{where}key={show(key)} must be one of {', '.join(known)}; "
                f"{nearest(key, known, otherwise='remove it')}"
            )
    for key in required:
        if key not in written:
            raise PlanError(f"{where}{key} must be given; add the line '{key}: ...'")
    return {
        key: parse(f"{where}{key}", written[key]) for key, parse in known.items() if key in written
    }


def _written_module(placement: ModulePlacement) -> dict[str, Any]:
    written: dict[str, Any] = {"ranks": rank_spans(placement.ranks)}
    for field in fields(placement):
        value = getattr(placement, field.name)
        if field.name not in ("name", "ranks") and value != field.default:
            written[field.name] = list(value) if isinstance(value, tuple) else value
    return written


class _UniqueKeyLoader(yaml.SafeLoader):
    """Refuses a key that stands twice in a mapping, where YAML keeps the last in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in seen:
                raise PlanError(
                    f"line {key.start_mark.line + 1}: key={show(key.value)} must stand once in "
                    f"its mapping; remove one of the two"
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep=deep)


def _parse_yaml(source: str) -> Any:
    try:
        return yaml.load(source, Loader=_UniqueKeyLoader)
    except PlanError:
        raise
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise PlanError(
            f"line {line}: text must be YAML ({_one_line(error.problem)}); mend the line"
        ) from None
    except (yaml.YAMLError, ValueError) as error:
        # Characters that YAML forbids, or dates and numbers that do not exist.
        raise PlanError(f"text must be YAML ({_one_line(error)}); mend the file") from None


def _one_line(problem: object) -> str:
    return " ".join(str(problem).split())
