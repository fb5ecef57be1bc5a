"""Writes docs/plan.md: every key of a plan file, from the classes that read it.

python -m tools.plan_reference            # writes the file
python -m tools.plan_reference --check    # exit status 1 if it is not what would be written
"""

import re
import sys
from collections.abc import Sequence
from dataclasses import MISSING, Field, fields
from inspect import cleandoc
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from megatron_mosaic.layout.attention import AttentionPlan
from megatron_mosaic.layout.placement import ModulePlacement
from megatron_mosaic.layout.plan import Plan, ScheduleChoice
from megatron_mosaic.layout.plan_file import FORMAT
from megatron_mosaic.layout.share import Share

TARGET = Path(__file__).resolve().parent.parent / "docs" / "plan.md"

INTRODUCTION = f"""# The plan file

Written by `make docs` from the docstrings of `megatron_mosaic/layout/`; change it there.

A plan says completely what runs where, in which order, and with which share of a GPU. It is YAML,
with sizes under Megatron's names. `megatron-mosaic plan` writes one, hands may as well, and
`megatron-mosaic check plan.yaml` says whether it can work. An unknown key, a missing one and a
contradiction are one line each, which names the place, the value, the rule and the remedy.

The first key is `format: {FORMAT}`.

```yaml
format: {FORMAT}
world_size: 4
global_batch_size: 64
micro_batch_size: 4
modules:
  vision: {{ranks: 0-3, data_parallel_size: 4}}
  language: {{ranks: 0-3, tensor_model_parallel_size: 2, pipeline_model_parallel_size: 2}}
edges: [[vision, language]]
schedule: {{kind: colocated, encoder_group: 2}}
```
"""


# What looks other in a file than in its class.
_WRITTEN = {"ranks": "span or list", "order": "mapping"}


class Section(NamedTuple):
    """A mapping of the file.

    Args:
        heading: Its place in the file.
        shape: The class that holds it.
        hidden: Fields that are no keys.
    """

    heading: str
    shape: type
    hidden: Sequence[str] = ()


SECTIONS = (
    Section("The file itself", Plan),
    Section("`modules.NAME`", ModulePlacement, hidden=("name",)),
    Section("`modules.language.attention`", AttentionPlan),
    Section("`modules.NAME.share`", Share),
    Section("`schedule`", ScheduleChoice),
)


class UndocumentedError(Exception):
    """A key has no words."""


def reference() -> str:
    """Returns the text of the whole file.

    Raises:
        UndocumentedError: The docstring of a class leaves out one of its fields.
    """
    return "\n".join([INTRODUCTION, *(_section(section) for section in SECTIONS)])


def _section(section: Section) -> str:
    meanings = documented_fields(section.shape)
    hints = get_type_hints(section.shape)
    lines = [f"## {section.heading}", "", "| key | value | default | meaning |"]
    lines.append("| --- | --- | --- | --- |")
    for field in fields(section.shape):
        if field.name in section.hidden:
            continue
        if field.name not in meanings:
            raise UndocumentedError(f"{section.shape.__name__}: {field.name} has no line in Args")
        cells = (
            f"`{field.name}`",
            _WRITTEN.get(field.name) or _kind(hints[field.name]),
            _default(field),
            meanings[field.name],
        )
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join([*lines, ""])


def documented_fields(shape: type) -> dict[str, str]:
    """Reads the words about each field from the section `Args` of a docstring."""
    _, _, behind = cleandoc(shape.__doc__ or "").partition("\nArgs:\n")
    entries = re.split(r"^    (\w+): ", _until_next_section(behind), flags=re.MULTILINE)[1:]
    return {
        name: _as_in_file(" ".join(words.split()))
        for name, words in zip(entries[::2], entries[1::2], strict=True)
    }


def _as_in_file(words: str) -> str:
    """Says in YAML's words what a docstring says in Python's."""
    for python, yaml in (("``None``", "no key"), ("``()``", "``[]``"), ("``", "`")):
        words = words.replace(python, yaml)
    return re.sub(r'`"(\w+)"`', r"`\1`", words)


def _until_next_section(text: str) -> str:
    return re.split(r"^\w+:$", text, maxsplit=1, flags=re.MULTILINE)[0]


def _default(field: Field[Any]) -> str:
    if field.default is MISSING and field.default_factory is MISSING:
        return "required"
    if field.default in (None, ()):
        return "absent"
    return f"`{str(field.default).lower() if isinstance(field.default, bool) else field.default}`"


def _kind(hint: Any) -> str:
    """What a value looks like in the file."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Literal:
        return ", ".join(f"`{word}`" for word in parts)
    if origin in (Union, UnionType):
        return ", ".join(_kind(part) for part in parts if part is not NoneType)
    words = {int: "integer", bool: "`true`, `false`", str: "text"}
    if hint in words:
        return words[hint]
    return "list" if origin is tuple else "mapping"


def main(arguments: Sequence[str]) -> int:
    """Writes the file, or compares it. Returns 1 if it should be written."""
    text = reference()
    if "--check" not in arguments:
        TARGET.write_text(text, encoding="utf-8")
        return 0
    if TARGET.exists() and TARGET.read_text(encoding="utf-8") == text:
        return 0
    print(f"{TARGET.name}: text must be as the docstrings say; run make docs", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
