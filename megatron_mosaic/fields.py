"""Reads single values of a file that a person wrote; every message says what to write instead.

``field`` is the name that messages give the value, with the place where it stands.
"""

from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from typing import Any

from megatron_mosaic.errors import PlanError

Parse = Callable[[str, Any], Any]


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
