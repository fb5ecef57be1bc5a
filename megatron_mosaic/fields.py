"""Reads single values of a file that a person wrote; every message says what to write instead.

``field`` is the name that messages give the value, with the place where it stands.
"""

from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from math import isfinite
from pathlib import Path
from typing import Any

import yaml

from megatron_mosaic.errors import PlanError

Parse = Callable[[str, Any], Any]

MAX_LAYERS = 10_000
"""More are a slip of the pen; they would be spelled out in memory."""


def show(value: object) -> str:
    """Text of a value in one line, as YAML spells constants and at most 80 characters long."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def nearest(name: object, known: Iterable[str], *, otherwise: str) -> str:
    """Advice for a name that does not exist: the most similar known one, or ``otherwise``."""
    matches = get_close_matches(str(name), known, n=1)
    return f"did you mean {matches[0]}?" if matches else otherwise


def integer(field: str, value: object) -> int:
    """Reads a whole number; YAML's true and 8.0 are none."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise PlanError(f"{field}={show(value)} must be an integer; write a whole number")
    return value


def positive(field: str, value: object) -> int:
    """Reads a whole number >= 1."""
    if integer(field, value) < 1:
        raise PlanError(f"{field}={show(value)} must be >= 1; write a positive number")
    return integer(field, value)


def layer_count(field: str, value: object) -> int:
    """Reads a number of layers, or of repetitions of them."""
    if positive(field, value) > MAX_LAYERS:
        raise PlanError(f"{field}={show(value)} must be <= {MAX_LAYERS} layers; mend the number")
    return positive(field, value)


def count(field: str, value: object) -> int:
    """Reads a whole number >= 0."""
    if integer(field, value) < 0:
        raise PlanError(f"{field}={show(value)} must be >= 0; write 0 for none")
    return integer(field, value)


def number(field: str, value: object) -> float:
    """Reads a finite number >= 0; YAML reads 2e12 as text, so text that is a number is one."""
    try:
        if isinstance(value, int | float | str) and not isinstance(value, bool):
            parsed = float(value)
            if isfinite(parsed) and parsed >= 0:
                return parsed
    except ValueError:
        pass
    raise PlanError(f"{field}={show(value)} must be a number >= 0; write one such as 3.35e+12")


def one_of(*choices: str) -> Parse:
    """Makes a reader of one of some words."""

    def read(field: str, value: object) -> str:
        if value not in choices:
            raise PlanError(
                f"{field}={show(value)} must be one of {', '.join(choices)}; "
                f"{nearest(value, choices, otherwise='write one of them')}"
            )
        return str(value)

    return read


def boolean(field: str, value: object) -> bool:
    """Reads true or false."""
    if not isinstance(value, bool):
        raise PlanError(f"{field}={show(value)} must be a boolean; write true or false")
    return value


def text(field: str, value: object) -> str:
    """Reads a string."""
    if not isinstance(value, str):
        raise PlanError(f"{field}={show(value)} must be a string; put it in quotes")
    return value


def integers(field: str, value: object) -> tuple[int, ...]:
    """Reads a list of whole numbers."""
    if not isinstance(value, list):
        raise PlanError(f"{field}={show(value)} must be a list of integers; write [17, 15]")
    return tuple(integer(f"{field}[{index}]", entry) for index, entry in enumerate(value))


def names(field: str, value: object) -> tuple[str, ...]:
    """Reads a list of strings, which may be empty."""
    if not isinstance(value, list):
        raise PlanError(
            f"{field}={show(value)} must be a list of names; "
            f"write [projector], [] for nothing, or remove the key for everything"
        )
    return tuple(text(f"{field}[{index}]", entry) for index, entry in enumerate(value))


def mapping(field: str, value: object) -> Mapping[Any, Any]:
    """Reads keys with values."""
    if not isinstance(value, dict):
        raise PlanError(f"{field}={show(value)} must be a mapping; write one 'key: value' per line")
    return value


def pairs(field: str, value: object) -> tuple[tuple[str, str], ...]:
    """Reads a list of edges ``[source, destination]``."""
    if not isinstance(value, list):
        raise PlanError(f"{field}={show(value)} must be a list; write [[vision, language]]")
    for index, pair in enumerate(value):
        if (
            not isinstance(pair, list)
            or len(pair) != 2
            or not all(isinstance(name, str) for name in pair)
        ):
            raise PlanError(
                f"{field}[{index}]={show(pair)} must be a pair of module names; "
                f"write [[vision, language]]"
            )
    return tuple((source, destination) for source, destination in value)


def read_text(path: str | Path) -> str:
    """Reads a text file.

    Raises:
        PlanError: There is none, or it is no text.
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise PlanError(f"{path}: file must be UTF-8 text; name another file") from None
    except OSError as error:
        reason = _one_line(error.strerror or error)
        raise PlanError(f"{path}: file must be readable ({reason}); check the path") from None


def parse_yaml(source: str) -> Any:
    """Parses YAML in which every key stands once.

    Raises:
        PlanError: The text is no YAML, or a mapping has a key twice.
    """
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


def check_format(where: str, document: Mapping[Any, Any], *, known: int) -> None:
    """Raises unless a document says that it is written in the format that is known."""
    if "format" not in document:
        raise PlanError(f"{where}format must be given; add the line 'format: {known}'")
    if integer(f"{where}format", document["format"]) != known:
        raise PlanError(
            f"{where}format={show(document['format'])} must be {known}, the one this version "
            f"reads; write the file again with this version"
        )


def read_keys(
    where: str, written: Mapping[Any, Any], *, known: Mapping[str, Parse], required: tuple[str, ...]
) -> dict[str, Any]:
    """Reads the keys that are written, in the order in which they are known.

    Raises:
        PlanError: A key is unknown, missing or mistyped.
    """
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


def _one_line(problem: object) -> str:
    return " ".join(str(problem).split())
