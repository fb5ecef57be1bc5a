"""Inputs and outputs of modules as model files write them."""

from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any

from megatron_mosaic.errors import LayoutError, PlanError
from megatron_mosaic.fields import Parse, boolean, count, mapping, positive, read_keys, show
from megatron_mosaic.model.spec import LanguageHead, Patches, Projector, TokenEmbedding

# For each part: key in the file, field of the dataclass, and what reads it.
_Table = Mapping[str, tuple[str, Parse]]


def _sizes(field: str, value: object) -> tuple[int, ...]:
    if not isinstance(value, list) or len(value) < 2:
        raise PlanError(
            f"{field}={show(value)} must be a list of at least two sizes; write [1024, 4096]"
        )
    return tuple(positive(f"{field}[{index}]", size) for index, size in enumerate(value))


_TABLES: Mapping[type, _Table] = {
    TokenEmbedding: {
        "vocab_size": ("vocab_size", positive),
        "learned_positions": ("num_positions", count),
    },
    Patches: {
        "values": ("values", positive),
        "learned_positions": ("num_positions", count),
        "extra_tokens": ("extra_tokens", count),
        "add_bias_linear": ("bias", boolean),
        "normed": ("normed", boolean),
    },
    LanguageHead: {
        "vocab_size": ("vocab_size", positive),
        "share_embeddings_and_output_weights": ("tied", boolean),
        "mtp_num_layers": ("mtp_layers", count),
    },
    Projector: {
        "sizes": ("sizes", _sizes),
        "merged_tokens": ("merged_tokens", positive),
        "add_bias_linear": ("bias", boolean),
        "pooled": ("pooled", boolean),
    },
}
_KEYS: Mapping[str, type] = {
    "embedding": TokenEmbedding,
    "patches": Patches,
    "head": LanguageHead,
    "projector": Projector,
}


def _reader(kind: type) -> Parse:
    table = _TABLES[kind]
    given = {it.name for it in fields(kind) if it.default is not MISSING}
    required = tuple(key for key, (field, _) in table.items() if field not in given)

    def read(where: str, value: object) -> Any:
        known = {key: parse for key, (_, parse) in table.items()}
        keys = read_keys(f"{where}: ", mapping(where, value), known=known, required=required)
        return kind(**{table[key][0]: value for key, value in keys.items()})

    return read


END_KEYS: Mapping[str, Parse] = {key: _reader(kind) for key, kind in _KEYS.items()}
"""Keys of a module that say what makes its first tokens, and what becomes of the last ones."""


def check_ends(where: str, keys: Mapping[str, Any]) -> None:
    """Raises if a module's input and output contradict each other or its size.

    Args:
        where: What messages begin with.
        keys: Of the module; values of ``END_KEYS`` are read.
    """
    for first, second in (("embedding", "patches"), ("head", "projector")):
        if first in keys and second in keys:
            raise PlanError(
                f"{where}: {first} must not stand beside {second}; remove one of the two"
            )
    head, projector = keys.get("head"), keys.get("projector")
    if head is not None and head.tied and "embedding" not in keys:
        raise PlanError(
            f"{where}.head: share_embeddings_and_output_weights=true must stand beside an "
            f"embedding; add one, or remove the key"
        )
    if projector is not None:
        _check_projector(f"{where}.projector", projector, hidden_size=keys["hidden_size"])


def _check_projector(where: str, projector: Projector, *, hidden_size: int) -> None:
    merged = 1 if projector.pooled else projector.merged_tokens
    if projector.sizes[0] != hidden_size * merged:
        rule = "hidden_size" if merged == 1 else "hidden_size * merged_tokens"
        raise LayoutError(
            f"{where}: sizes[0]={projector.sizes[0]} must be {rule}={hidden_size * merged}; "
            f"write sizes: [{hidden_size * merged}, ...]"
        )


def write_end(part: TokenEmbedding | Patches | LanguageHead | Projector | None) -> dict[str, Any]:
    """Writes an input or output with its key; what is as usual is left out."""
    if part is None:
        return {}
    defaults = {it.name: it.default for it in fields(part)}
    written = {
        key: list(value) if isinstance(value, tuple) else value
        for key, (field, _) in _TABLES[type(part)].items()
        if (value := getattr(part, field)) != defaults[field]
    }
    return {next(key for key, kind in _KEYS.items() if kind is type(part)): written}
