"""Checkouts of Megatron-LM that tests are pointed at, and copies of them that can be run."""

import filecmp
import importlib.metadata
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

# Variable of the environment with the checkout's folder, by the series that is for it.
VARIABLES: Mapping[str, str] = {
    "core_v0.19.0": "MEGATRON_LM_DIR",
    "main_2026_08": "MEGATRON_LM_MAIN_DIR",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Upstream:
    """A checkout of one of the versions.

    Args:
        series: Name of the series for it.
        folder: Its top folder.
    """

    series: str
    folder: Path


def upstream(series: str) -> Upstream:
    """Finds the checkout for a series, or skips the test."""
    variable = VARIABLES[series]
    folder = os.environ.get(variable, "")
    if not folder:
        pytest.skip(f"{variable} names no checkout of Megatron-LM for {series}")
    return Upstream(series=series, folder=Path(folder))


def copy_of(checkout: Upstream, place: Path) -> Path:
    """Copies what a run needs: the scripts and ``megatron``, with the compiled data-set helpers.

    A checkout compiles them when it first runs; the installed wheel has them ready, and they are
    the same in both versions.
    """
    tree = place / checkout.series
    tree.mkdir()
    for script in checkout.folder.glob("*.py"):
        shutil.copy(script, tree)
    shutil.copytree(checkout.folder / "megatron", tree / "megatron")
    for file in importlib.metadata.files("megatron-core") or ():
        if file.name.startswith("helpers_cpp"):
            shutil.copy(str(file.locate()), tree / file)
    return tree


def differences(tree: Path, checkout: Path) -> list[str]:
    """Names the files of a checkout that its copy does not have alike."""
    files = [*checkout.glob("*.py"), *checkout.glob("megatron/**/*.py")]
    names = [str(file.relative_to(checkout)) for file in files]
    return [name for name in names if not filecmp.cmp(tree / name, checkout / name, shallow=False)]
