"""The model file: YAML with Megatron's names to a ``ModelSpec`` and back."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import yaml

from megatron_mosaic.errors import LayoutError, PlanError
from megatron_mosaic.fields import (
    Parse,
    boolean,
    check_format,
    count,
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
    LanguageHead,
    LayerRun,
    ModelSpec,
    ModuleSpec,
    Patches,
    Precision,
    Projector,
    TokenEmbedding,
)
from megatron_mosaic.model.tokens import Distribution

FORMAT = 1

PARTS = ("input", "layers", "projector", "head")
"""Names of parts in ``trainable``; anything else there must be a pattern."""

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
        "num_layers": positive,
        **LAYER_KEYS,
        "layer_kinds": mapping,
        "layers": lambda field, value: value,
        "embedding": _embedding,
        "patches": _patches,
        "head": _head,
        "projector": _projector,
        "seq_length": positive,
        "items_per_sample": distribution,
        "tokens_per_item": distribution,
        "trainable": _trainable,
        "lora_rank": count,
    }
    keys = read_keys(f"{where}: ", mapping(where, written), known=known, required=("hidden_size",))
    _check_one(where, keys, "embedding", "patches")
    _check_one(where, keys, "head", "projector")
    return ModuleSpec(
        name=name,
        hidden_size=keys["hidden_size"],
        layers=_read_layers(where, keys),
        norm=_NORMS[keys.get("normalization", "RMSNorm")],  # type: ignore[arg-type]
        causal=keys.get("causal", name == "language"),
        input=keys.get("embedding", keys.get("patches")),
        output=_fitting_output(where, keys),
        items_per_sample=keys.get("items_per_sample", Distribution.constant(1)),
        tokens_per_item=_read_tokens(where, keys),
        trainable=keys.get("trainable"),
        lora_rank=keys.get("lora_rank", 0),
        final_norm=keys.get("final_layernorm", True),
    )


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
        place = f"{where}.layer_kinds.{kind}"
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
    _check_one(where, keys, "seq_length", "tokens_per_item")
    if "seq_length" in keys:
        return Distribution.constant(keys["seq_length"])
    if "tokens_per_item" not in keys:
        raise PlanError(
            f"{where}: tokens_per_item must be given; add the line 'tokens_per_item: 576', or "
            f"seq_length for a language model"
        )
    return keys["tokens_per_item"]


def _embedding(field: str, value: object) -> TokenEmbedding:
    known: Mapping[str, Parse] = {"vocab_size": positive, "learned_positions": count}
    keys = read_keys(f"{field}: ", mapping(field, value), known=known, required=("vocab_size",))
    return TokenEmbedding(
        vocab_size=keys["vocab_size"], num_positions=keys.get("learned_positions", 0)
    )


def _patches(field: str, value: object) -> Patches:
    known: Mapping[str, Parse] = {
        "values": positive,
        "learned_positions": count,
        "extra_tokens": count,
        "add_bias_linear": boolean,
        "normed": boolean,
    }
    keys = read_keys(f"{field}: ", mapping(field, value), known=known, required=("values",))
    return Patches(
        values=keys["values"],
        num_positions=keys.get("learned_positions", 0),
        extra_tokens=keys.get("extra_tokens", 0),
        bias=keys.get("add_bias_linear", False),
        normed=keys.get("normed", False),
    )


def _head(field: str, value: object) -> LanguageHead:
    tied = "share_embeddings_and_output_weights"
    known: Mapping[str, Parse] = {"vocab_size": positive, tied: boolean, "mtp_num_layers": count}
    keys = read_keys(f"{field}: ", mapping(field, value), known=known, required=("vocab_size",))
    return LanguageHead(
        vocab_size=keys["vocab_size"],
        tied=keys.get(tied, False),
        mtp_layers=keys.get("mtp_num_layers", 0),
    )


def _projector(field: str, value: object) -> Projector:
    known: Mapping[str, Parse] = {
        "sizes": _sizes,
        "merged_tokens": positive,
        "add_bias_linear": boolean,
    }
    keys = read_keys(f"{field}: ", mapping(field, value), known=known, required=("sizes",))
    return Projector(
        sizes=keys["sizes"],
        merged_tokens=keys.get("merged_tokens", 1),
        bias=keys.get("add_bias_linear", True),
    )


def _sizes(field: str, value: object) -> tuple[int, ...]:
    if not isinstance(value, list) or len(value) < 2:
        raise PlanError(
            f"{field}={show(value)} must be a list of at least two sizes; write [1024, 4096]"
        )
    return tuple(positive(f"{field}[{index}]", size) for index, size in enumerate(value))


def _trainable(field: str, value: object) -> tuple[str, ...]:
    for part in names(field, value):
        if part not in PARTS and not any(letter in part for letter in "*?["):
            raise PlanError(
                f"{field}={show(part)} must be one of {', '.join(PARTS)}, or a pattern with *; "
                f"{nearest(part, PARTS, otherwise='write one of them')}"
            )
    return names(field, value)


def _fitting_output(where: str, keys: Mapping[str, Any]) -> LanguageHead | Projector | None:
    projector, head = keys.get("projector"), keys.get("head")
    if projector is not None:
        size = keys["hidden_size"] * projector.merged_tokens
        if projector.sizes[0] != size:
            raise LayoutError(
                f"{where}.projector: sizes[0]={projector.sizes[0]} must be hidden_size * "
                f"merged_tokens={size}; write sizes: [{size}, ...]"
            )
        return projector
    if head is not None and head.tied and "embedding" not in keys:
        raise PlanError(
            f"{where}.head: share_embeddings_and_output_weights=true must stand beside an "
            f"embedding; add one, or remove the key"
        )
    return head


def _check_one(where: str, keys: Mapping[str, Any], first: str, second: str) -> None:
    if first in keys and second in keys:
        raise PlanError(f"{where}: {first} must not stand beside {second}; remove one of the two")


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
    written: dict[str, Any] = {
        "hidden_size": module.hidden_size,
        "normalization": norms[module.norm],
        "causal": module.causal,
        "final_layernorm": module.final_norm,
        **_written_layers(module.layers),
        **_written_ends(module),
        "items_per_sample": write_distribution(module.items_per_sample),
        "tokens_per_item": write_distribution(module.tokens_per_item),
    }
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


def _written_ends(module: ModuleSpec) -> dict[str, Any]:
    written: dict[str, Any] = {}
    match module.input:
        case TokenEmbedding() as table:
            written["embedding"] = {
                "vocab_size": table.vocab_size,
                "learned_positions": table.num_positions,
            }
        case Patches() as patches:
            written["patches"] = {
                "values": patches.values,
                "learned_positions": patches.num_positions,
                "extra_tokens": patches.extra_tokens,
                "add_bias_linear": patches.bias,
                "normed": patches.normed,
            }
    match module.output:
        case LanguageHead() as head:
            written["head"] = {
                "vocab_size": head.vocab_size,
                "share_embeddings_and_output_weights": head.tied,
                "mtp_num_layers": head.mtp_layers,
            }
        case Projector() as projector:
            written["projector"] = {
                "sizes": list(projector.sizes),
                "merged_tokens": projector.merged_tokens,
                "add_bias_linear": projector.bias,
            }
    return written
