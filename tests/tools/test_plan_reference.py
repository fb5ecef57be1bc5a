from dataclasses import dataclass

import pytest

from megatron_mosaic.layout.plan import Plan
from megatron_mosaic.layout.plan_file import _MODULE_KEYS, _PLAN_KEYS, _SCHEDULE_KEYS
from tools.plan_reference import (
    TARGET,
    Section,
    UndocumentedError,
    _section,
    documented_fields,
    reference,
)


def test_committed_reference_is_what_the_docstrings_say():
    assert TARGET.read_text(encoding="utf-8") == reference(), "run make docs"


def test_reference_has_every_key_that_a_plan_file_may_have():
    text = reference()

    keys = {*_PLAN_KEYS, *_MODULE_KEYS, *_SCHEDULE_KEYS} - {"format"}
    assert [key for key in keys if f"\n| `{key}` | " not in text] == []


def test_example_of_the_reference_is_a_plan():
    _, _, behind = reference().partition("```yaml\n")
    plan = Plan.loads(behind.partition("```")[0], where="docs/plan.md")

    assert sorted(plan.modules) == ["language", "vision"]


def test_words_of_python_become_words_of_the_file():
    @dataclass
    class Lamp:
        """A lamp.

        Args:
            light: How it shines: ``"warm"`` or
                ``"cold"``; ``None`` is dark, ``()`` is broken.

        Raises:
            ValueError: never.
        """

        light: str

    assert documented_fields(Lamp) == {
        "light": "How it shines: `warm` or `cold`; no key is dark, `[]` is broken."
    }


def test_key_without_words_stops_the_generator():
    @dataclass
    class Lamp:
        """A lamp."""

        light: str

    with pytest.raises(UndocumentedError, match="Lamp: light has no line in Args"):
        _section(Section("lamp", Lamp))
