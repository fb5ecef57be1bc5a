"""Every fault of the table in the documentation has a test that injects it."""

import ast
import re
from functools import cache

import pytest

from tests.ranks import ROOT

ROWS = [
    [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
    for line in (ROOT / "docs" / "faults.md").read_text().splitlines()
    if line.startswith("| ")
][2:]


@cache
def _tests_of(path: str) -> set[str]:
    tree = ast.parse((ROOT / path).read_text())
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def test_table_has_the_faults_that_long_runs_meet():
    faults = " / ".join(row[0] for row in ROWS)

    met = ("hangs", "corrupted or half-written", "disk is full", "not a number", "does not decode")
    for fault in (*met, "loader's process dies", "SIGTERM", "nodes are lost"):
        assert fault in faults


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_row_of_the_table_names_tests_that_exist(row):
    assert len(row) == 5
    named = re.findall(r"`(tests/[\w/]+\.py)::(test_\w+)`", row[4])
    assert named
    for path, test in named:
        assert test in _tests_of(path), f"{path} has no {test}"
