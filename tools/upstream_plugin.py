"""Runs Megatron's own tests in one rank process, and writes what became of each.

The part of ``run_upstream_tests.py`` that runs in the ranks.
"""

import importlib
import json
import os
import pkgutil
import sys
import unittest.mock
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import IO

import pytest

from tools.upstream_stand_ins import install_stand_ins

OPTIONS = ("-q", "--continue-on-collection-errors", "--assert=plain", "-W", "ignore")
# Hangs are the caller's to end, and the checkout stays as it is.
OPTIONS += ("-p", "no:faulthandler", "-p", "no:cacheprovider")


def run_tests(
    rank: int,
    tree: str,
    tests: Sequence[str],
    folder: str,
    with_mosaic: bool,
    member_groups: bool,
) -> None:
    """Runs tests in this rank process, which can run nothing else afterwards.

    Args:
        rank: This rank.
        tree: Folder with Megatron's ``tests``; it becomes the process's own.
        tests: Modules or tests relative to ``tree``, and options of pytest.
        folder: Where ``rank<r>.jsonl``, the outcomes, and ``rank<r>.log`` go.
        with_mosaic: Whether to import everything of megatron_mosaic first.
        member_groups: Whether, on CPU, a process group is created by its members alone.
    """
    _prepare(with_mosaic=with_mosaic, member_groups=member_groups)
    _enter(tree)
    with (
        (Path(folder) / f"rank{rank}.log").open("w") as log,
        (Path(folder) / f"rank{rank}.jsonl").open("w", buffering=1) as outcomes,
        redirect_stdout(log),
        redirect_stderr(log),
    ):
        pytest.main([*OPTIONS, *tests], plugins=[UpstreamPlugin(outcomes)])


def _prepare(*, with_mosaic: bool, member_groups: bool) -> None:
    import torch

    if not torch.cuda.is_available():
        from megatron_mosaic.host.cpu import run_on_cpu

        run_on_cpu()
    install_stand_ins(member_groups=member_groups)
    if with_mosaic:
        import megatron_mosaic

        for module in pkgutil.walk_packages(megatron_mosaic.__path__, "megatron_mosaic."):
            importlib.import_module(module.name)


def _enter(tree: str) -> None:
    """Makes ``tests`` and ``examples`` mean Megatron's; ``megatron`` stays the installed one."""
    os.chdir(tree)
    # Processes that a test spawns would import our main module first.
    sys.modules["__main__"] = ModuleType("__main__")
    ours = Path(__file__).resolve().parent.parent
    sys.path[:] = [tree, *(place for place in sys.path if Path(place).resolve() != ours)]
    sys.dont_write_bytecode = True
    for name in list(sys.modules):
        if name.partition(".")[0] in ("tests", "examples"):
            del sys.modules[name]


class UpstreamPlugin:
    """Writes a line when a test starts and one for each of its phases.

    A line is written before the next phase starts: of a rank that dies or hangs, the test that
    did it is known.
    """

    def __init__(self, outcomes: IO[str]) -> None:
        self._outcomes = outcomes

    @pytest.fixture
    def mocker(self) -> Iterator[SimpleNamespace]:
        """Offers what the tests use of pytest-mock, which need not be installed."""
        mock = unittest.mock
        with ExitStack() as patches:
            yield SimpleNamespace(
                Mock=mock.Mock,
                MagicMock=mock.MagicMock,
                patch=lambda *args, **options: patches.enter_context(mock.patch(*args, **options)),
            )

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """Notes that a test starts."""
        self._write(nodeid, "start", "", "")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Notes the outcome of set-up, call or tear-down."""
        self._write(report.nodeid, report.when or "", report.outcome, report.longreprtext)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Notes a module that cannot be imported, as a test that failed."""
        if report.failed:
            self._write(f"{report.nodeid}::import", "teardown", "failed", report.longreprtext)

    def _write(self, test: str, phase: str, outcome: str, reason: str) -> None:
        self._outcomes.write(json.dumps([test, phase, outcome, reason]) + "\n")
