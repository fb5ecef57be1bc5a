"""Imported once by the process that the tests' ranks are forked from."""

import hypothesis  # noqa: F401
import pytest  # noqa: F401

from megatron_mosaic.rehearsal import preload  # noqa: F401
