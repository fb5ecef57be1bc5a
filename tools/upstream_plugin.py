"""Runs Megatron's own tests in one rank, and writes what became of each.

The part of ``run_upstream_tests.py`` that runs in the rank processes.
"""

import importlib
import importlib.util
import json
import os
import pkgutil
import sys
import unittest.mock
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import IO, Any

import pytest

# Tests that build layers from TransformerEngine take the local ones where it is not installed.
_GPT = "megatron.core.models.gpt.gpt_layer_specs"
_VIT = "megatron.core.models.vision.vit_layer_specs"
_TE = "megatron.core.extensions.transformer_engine"
_LINEAR = "megatron.core.tensor_parallel.layers"
STAND_INS = {
    f"{_GPT}:get_gpt_layer_with_transformer_engine_spec": f"{_GPT}:get_gpt_layer_local_spec",
    f"{_GPT}:get_gpt_layer_with_transformer_engine_submodules": (
        f"{_GPT}:get_gpt_layer_local_submodules"
    ),
    f"{_VIT}:get_vit_layer_with_transformer_engine_spec": f"{_VIT}:get_vit_layer_with_local_spec",
    f"{_TE}:TEColumnParallelLinear": f"{_LINEAR}:ColumnParallelLinear",
    f"{_TE}:TERowParallelLinear": f"{_LINEAR}:RowParallelLinear",
}

OPTIONS = (
    "-q",
    "--continue-on-collection-errors",
    "-W",
    "ignore",
    "--assert=plain",
    "-p",
    "no:faulthandler",
    "-p",
    "no:cacheprovider",
)


def run_tests(rank: int, tree: str, tests: Sequence[str], folder: str, with_mosaic: bool) -> int:
    """Runs tests in this rank process. Returns pytest's exit status.

    Args:
        rank: This rank.
        tree: Folder with Megatron's ``tests``; it becomes the process's own.
        tests: Modules or tests, relative to ``tree``.
        folder: Where ``rank<r>.jsonl``, the outcomes, and ``rank<r>.log`` go.
        with_mosaic: Whether to import everything of megatron_mosaic first.
    """
    _prepare(with_mosaic=with_mosaic)
    _enter(tree)
    with (
        (Path(folder) / f"rank{rank}.log").open("w") as log,
        (Path(folder) / f"rank{rank}.jsonl").open("w", buffering=1) as outcomes,
        redirect_stdout(log),
        redirect_stderr(log),
    ):
        return pytest.main([*OPTIONS, *tests], plugins=[UpstreamPlugin(outcomes)])


def _prepare(*, with_mosaic: bool) -> None:
    import torch

    from megatron_mosaic.host.cpu import run_on_cpu

    if not torch.cuda.is_available():
        run_on_cpu()
    if importlib.util.find_spec("transformer_engine") is None:
        _use_local_layers()
    if with_mosaic:
        import megatron_mosaic

        for module in pkgutil.walk_packages(megatron_mosaic.__path__, "megatron_mosaic."):
            importlib.import_module(module.name)


def _use_local_layers() -> None:
    for symbol, stand_in in STAND_INS.items():
        (module, _, name), (source, _, local) = symbol.partition(":"), stand_in.partition(":")
        setattr(
            importlib.import_module(module), name, getattr(importlib.import_module(source), local)
        )


def _enter(tree: str) -> None:
    """Makes ``tests`` mean Megatron's; ``megatron`` stays the installed one."""
    os.chdir(tree)
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
    def mocker(self) -> Any:
        """Offers what the tests use of pytest-mock, which need not be installed."""
        return unittest.mock

    @pytest.fixture(autouse=True)
    def ready_for_local_layers(self) -> None:
        """Prepares what TransformerEngine's layers do without and local ones use.

        Tests that lay out ranks with a grid alone never call what would do it.
        """
        from megatron.core import parallel_state
        from megatron.core.tensor_parallel import random

        if not random.get_cuda_rng_tracker().get_states():
            random.model_parallel_cuda_manual_seed(1, tp_rank=0, ep_rank=0, etp_rank=0)
        if parallel_state._GLOBAL_MEMORY_BUFFER is None:
            parallel_state._set_global_memory_buffer()

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """Notes that a test starts."""
        self._write(nodeid, "start", "", "")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Notes the outcome of set-up, call or tear-down."""
        self._write(report.nodeid, report.when or "", report.outcome, report.longreprtext)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Notes a module that cannot be imported, as a test that failed."""
        if report.failed:
            self._write(f"{report.nodeid}::import", "call", "failed", report.longreprtext)

    def _write(self, test: str, phase: str, outcome: str, reason: str) -> None:
        self._outcomes.write(json.dumps([test, phase, outcome, reason]) + "\n")
