"""The model file: YAML with Megatron's names to a ``ModelSpec`` and back."""

from collections.abc import Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any, get_args

import yaml

from megatron_mosaic.errors import LayoutError, PlanError
from megatron_mosaic.fields import (
    Parse,
    boolean,
    check_format,
    count,
    layer_count,
    mapping,
    names,
    nearest,
    one_of,
    pairs,
    parse_yaml,
    positive,
    read_keys,
    read_text,
    show,
    text,
)
from megatron_mosaic.model.distribution_file import read_distribution, write_distribution
from megatron_mosaic.model.end_file import END_KEYS, check_ends, write_end
from megatron_mosaic.model.layer_file import (
    LAYER_KEYS,
    check_all_used,
    describe_kind,
    read_layer,
    read_runs,
    write_layer,
    write_runs,
)
from megatron_mosaic.model.layers import Layer
from megatron_mosaic.model.spec import (
    LANGUAGE,
    LayerRun,
    ModelSpec,
    ModuleSpec,
    Precision,
    Projector,
)
from megatron_mosaic.model.tokens import Distribution
from megatron_mosaic.tokens.names import Preset

FORMAT = 1

_NORMS = {"RMSNorm": "rms", "LayerNorm": "layer"}


def read_model(path: str | Path) -> ModelSpec:
    """Reads a model file.

    Raises:
        PlanError: There is no such file, or a key is unknown, missing or mistyped.
        LayoutError: Numbers contradict each other.
    """
    return parse_model(read_text(path), where=str(path), folder=Path(path).parent)


def parse_model(source: str, *, where: str, folder: Path = Path()) -> ModelSpec:
    """Reads the text of a model file.

    Args:
        source: YAML.
        where: What messages begin with.
        folder: What names of histogram files are relative to.

    Raises:
        PlanError: A key is unknown, missing or mistyped.
        LayoutError: Numbers contradict each other.
    """
    try:
        return model_from_document(parse_yaml(source), folder=folder)
    except (PlanError, LayoutError) as error:
        raise type(error)(f"{where}: {error}") from None


def model_from_document(document: object, *, folder: Path = Path()) -> ModelSpec:
    """Reads a model from the mapping that a model file contains."""
    written = mapping("model", document)
    check_format("", written, known=FORMAT)
    known: Mapping[str, Parse] = {
        "format": positive,
        "name": text,
        "source": _texts,
        "precision": one_of(*get_args(Precision)),
        "edges": pairs,
        "modules": mapping,
    }
    keys = read_keys("", written, known=known, required=("name", "modules"))
    modules = {name: _read_module(name, it, folder) for name, it in keys["modules"].items()}
    edges = keys.get("edges", ())
    _check_edges(modules, edges)
    _check_inputs(modules, edges)
    return ModelSpec(
        name=keys["name"],
        modules=modules,
        edges=edges,
        precision=keys.get("precision", "bf16"),
        sources=keys.get("source", ()),
    )


def _texts(field: str, value: object) -> tuple[str, ...]:
    return names(field, value) if isinstance(value, list) else (text(field, value),)


def _read_module(name: Any, written: object, folder: Path) -> ModuleSpec:
    if not isinstance(name, str) or not name.isidentifier():
        raise PlanError(
            f"modules: name={show(name)} must be letters, digits and underscores; rename the module"
        )
    where = f"modules.{name}"

    def distribution(field: str, value: object) -> Distribution:
        return read_distribution(field, value, folder=folder)

    known: Mapping[str, Parse] = {
        "hidden_size": positive,
        "normalization": one_of(*_NORMS),
        "final_layernorm": boolean,
        "causal": boolean,
        "num_layers": layer_count,
        **LAYER_KEYS,
        "layer_kinds": mapping,
        "layers": lambda field, value: value,
        **END_KEYS,
        "seq_length": positive,
        "items_per_sample": distribution,
        "tokens_per_item": distribution,
        "mask": one_of(*get_args(Preset)),
        "tokens_per_document": distribution,
        "trainable": names,
        "lora_rank": count,
    }
    keys = read_keys(f"{where}: ", mapping(where, written), known=known, required=("hidden_size",))
    check_ends(where, keys)
    module = ModuleSpec(
        name=name,
        hidden_size=keys["hidden_size"],
        layers=_read_layers(where, keys),
        norm=_NORMS[keys.get("normalization", "RMSNorm")],  # type: ignore[arg-type]
        causal=keys.get("causal", name == "language"),
        input=keys.get("embedding", keys.get("patches")),
        output=keys.get("head", keys.get("projector")),
        items_per_sample=keys.get("items_per_sample", Distribution.constant(1)),
        tokens_per_item=_read_tokens(where, keys),
        mask=keys.get("mask"),
        tokens_per_document=keys.get("tokens_per_document"),
        trainable=keys.get("trainable"),
        lora_rank=keys.get("lora_rank", 0),
        final_norm=keys.get("final_layernorm", True),
    )
    _check_trainable(where, module)
    _check_mask(where, module)
    return module


def _read_layers(where: str, keys: Mapping[str, Any]) -> tuple[LayerRun, ...]:
    shared = {key: value for key, value in keys.items() if key in LAYER_KEYS}
    size = {"hidden_size": keys["hidden_size"]}
    if "layer_kinds" not in keys:
        if "num_layers" not in keys or "layers" in keys:
            raise PlanError(
                f"{where}: num_layers must be given where all layers are equal; "
                f"add num_layers, or both layer_kinds and layers"
            )
        layer = read_layer(where, shared, size)
        check_all_used(where, shared, [layer])
        return (LayerRun(keys["num_layers"], layer),)
    kinds: dict[str, Layer] = {}
    for kind, written in keys["layer_kinds"].items():
        place = f"{where}.layer_kinds.{text(f'{where}.layer_kinds: kind', kind)}"
        own = read_keys(f"{place}: ", mapping(place, written), known=LAYER_KEYS, required=())
        kinds[kind] = read_layer(place, own, {**size, **shared})
        check_all_used(place, own, [kinds[kind]])
    check_all_used(where, shared, kinds.values())
    if "layers" not in keys:
        raise PlanError(f"{where}: layers must be given beside layer_kinds; list the kinds")
    runs = read_runs(f"{where}.layers", keys["layers"], kinds)
    total = sum(run.count for run in runs)
    if keys.get("num_layers", total) != total:
        raise LayoutError(
            f"{where}: num_layers={keys['num_layers']} must be the number of layers={total}; "
            f"remove it, or mend layers"
        )
    return runs


def _read_tokens(where: str, keys: Mapping[str, Any]) -> Distribution:
    if "seq_length" in keys:
        if "tokens_per_item" in keys:
            raise PlanError(
                f"{where}: seq_length={keys['seq_length']} must not stand beside tokens_per_item; "
                f"remove one of the two"
            )
        return Distribution.constant(keys["seq_length"])
    if "tokens_per_item" not in keys:
        raise PlanError(
            f"{where}: tokens_per_item must be given; add the line 'tokens_per_item: 576', or "
            f"seq_length for a language model"
        )
    return keys["tokens_per_item"]


def _check_trainable(where: str, module: ModuleSpec) -> None:
    parts = dict.fromkeys(module.part_names.values())
    for part in module.trainable or ():
        if part not in parts and not any(letter in part for letter in "*?["):
            raise PlanError(
                f"{where}: trainable={show(part)} must be one of {', '.join(parts)}, or a pattern "
                f"with *; {nearest(part, parts, otherwise='write one of them')}"
            )


def _check_mask(where: str, module: ModuleSpec) -> None:
    documents = module.tokens_per_document
    if module.mask is None:
        if documents is not None:
            raise PlanError(
                f"{where}: tokens_per_document must go with mask: packed documents are isolated "
                f"by it; add the line 'mask: multimodal_packed'"
            )
        return
    if module.name != LANGUAGE:
        raise PlanError(
            f"{where}: mask={module.mask} must stand under language alone, the tokens of an "
            f"encoder's item see each other; remove it"
        )
    if module.mask == "multimodal_packed" and documents is None:
        raise PlanError(
            f"{where}: tokens_per_document must be given with mask=multimodal_packed; add the "
            f"line 'tokens_per_document: 2400'"
        )
    if documents is None:
        return
    if module.mask in ("encoder_prepended", "encoder_embedded"):
        raise PlanError(
            f"{where}: tokens_per_document must be absent with mask={module.mask}, which has one "
            f"document; write mask: multimodal_packed"
        )
    if documents.values[0] < 1:
        raise PlanError(
            f"{where}: tokens_per_document={documents.values[0]:g} must be >= 1; leave out empty "
            f"documents"
        )


def _check_edges(modules: Mapping[str, ModuleSpec], edges: tuple[tuple[str, str], ...]) -> None:
    if "language" not in modules:
        raise PlanError(
            f"modules={', '.join(map(str, modules))} must include language, the one that "
            f"computes the loss; add it"
        )
    for edge in edges:
        for end in edge:
            if end not in modules:
                raise PlanError(
                    f"edges: module={show(end)} must be one of {', '.join(modules)}; "
                    f"{nearest(end, modules, otherwise='add it to modules')}"
                )
        source, destination = modules[edge[0]], modules[edge[1]]
        output = source.output
        size = output.sizes[-1] if isinstance(output, Projector) else source.hidden_size
        if size != destination.hidden_size:
            raise LayoutError(
                f"edges: output of {source.name}={size} must be hidden_size of "
                f"{destination.name}={destination.hidden_size}; mend the projector"
            )
    for name in modules.keys() - {"language"} - {end for edge in edges for end in edge}:
        raise PlanError(
            f"edges: module={show(name)} must be connected; add the edge [{name}, language]"
        )
    if len(set(edges)) < len(edges):
        twice = next(edge for edge in edges if edges.count(edge) > 1)
        raise PlanError(f"edges: edge={show(list(twice))} must stand once; remove one of the two")
    try:
        TopologicalSorter({name: [a for a, b in edges if b == name] for name in modules}).prepare()
    except CycleError as error:
        ring = " -> ".join(reversed(error.args[1]))
        raise PlanError(f"edges={ring} must not form a circle; remove one of them") from None


def _check_inputs(modules: Mapping[str, ModuleSpec], edges: tuple[tuple[str, str], ...]) -> None:
    for name in modules.keys() - {destination for _, destination in edges}:
        if modules[name].input is None:
            raise PlanError(
                f"modules.{name}: embedding or patches must be given where no edge leads to the "
                f"module; add one of them, or an edge"
            )


def write_model(model: ModelSpec) -> str:
    """Writes a model as YAML that ``parse_model`` gives back."""
    document: dict[str, Any] = {"format": FORMAT, "name": model.name}
    if model.sources:
        document["source"] = list(model.sources)
    document["precision"] = model.precision
    if model.edges:
        document["edges"] = [list(edge) for edge in model.edges]
    document["modules"] = {name: _written_module(it) for name, it in model.modules.items()}
    return yaml.safe_dump(document, sort_keys=False, default_flow_style=None, width=100)


def _written_module(module: ModuleSpec) -> dict[str, Any]:
    norms = {norm: name for name, norm in _NORMS.items()}
    written: dict[str, Any] = {"hidden_size": module.hidden_size}
    if module.norm != "rms":
        written["normalization"] = norms[module.norm]
    if module.causal != (module.name == "language"):
        written["causal"] = module.causal
    if not module.final_norm:
        written["final_layernorm"] = False
    written |= {
        **_written_layers(module.layers),
        **write_end(module.input),
        **write_end(module.output),
    }
    if module.items_per_sample != Distribution.constant(1):
        written["items_per_sample"] = write_distribution(module.items_per_sample)
    written["tokens_per_item"] = write_distribution(module.tokens_per_item)
    if module.mask is not None:
        written["mask"] = module.mask
    if module.tokens_per_document is not None:
        written["tokens_per_document"] = write_distribution(module.tokens_per_document)
    if module.trainable is not None:
        written["trainable"] = list(module.trainable)
    if module.lora_rank:
        written["lora_rank"] = module.lora_rank
    return written


def _written_layers(runs: tuple[LayerRun, ...]) -> dict[str, Any]:
    kinds: dict[Layer, str] = {}
    for _, layer in runs:
        name = describe_kind(layer)
        if layer not in kinds:
            same = sum(known.startswith(name) for known in kinds.values())
            kinds[layer] = f"{name}_{same + 1}" if same else name
    if len(runs) == 1:
        return {"num_layers": runs[0].count, **write_layer(runs[0].layer)}
    return {
        "layer_kinds": {name: write_layer(layer) for layer, name in kinds.items()},
        "layers": write_runs(runs, kinds),
    }
