"""Runs Megatron's own unit tests with and without megatron_mosaic imported, and compares.

    python tools/run_upstream_tests.py CHECKOUT [--only WORD] [--logs FOLDER]

CHECKOUT is a checkout of Megatron-LM at the tag that belongs to the installed megatron-core. Only
its tests and examples are used; ``megatron`` is the installed one. Ranks use the machine's GPUs;
without any they run on CPU with gloo, as ``megatron_mosaic.host.cpu`` makes them. What is not
installed (TransformerEngine, data to download) makes some tests fail, with and without Mosaic.

Exit status: 0, or 1 if a test that passes without Mosaic does not pass with it.
"""

import argparse
import io
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.ranks import RanksError, run_ranks
from tools.upstream_plugin import run_tests

# The rest needs TransformerEngine, more memory than a small machine has, or GPUs.
_MIMO = "models/mimo/test_mimo"


@dataclass(frozen=True, kw_only=True, slots=True)
class Suite:
    """Test modules that run in one launch.

    Args:
        num_ranks: Ranks; with fewer GPUs than that, as many as there are GPUs.
        modules: Paths below ``tests/unit_tests``, without ``.py``.
        options: Of pytest.
        timeout_s: Ends the launch; what has not run by then counts as failed.
        member_groups: Whether the tests have ranks create only the groups that they are in.
    """

    num_ranks: int
    modules: tuple[str, ...]
    options: tuple[str, ...] = ()
    timeout_s: float = 180.0
    member_groups: bool = False


COMMUNICATORS = Suite(
    num_ranks=8,
    modules=(
        "test_process_groups_config",
        "test_hyper_comm_grid",
        "pipeline_parallel/test_bridge_communicator",
        "pipeline_parallel/test_multimodule_communicator",
        f"{_MIMO}_colocated_communicator",
    ),
)
MODULES = Suite(
    num_ranks=8,
    modules=(
        f"{_MIMO}_1f1b_schedule",
        f"{_MIMO}_checkpoint",
        f"{_MIMO}_grad_sync",
        f"{_MIMO}_forward_step",
        f"{_MIMO}_encoder_prefetch",
        f"{_MIMO}_overlap_lifecycle",
        f"{_MIMO}_zero_grad_buffer",
        f"{_MIMO}_optimizer_consensus",
        f"{_MIMO}_partition",
        "test_mimo_hetero_topology",
        "distributed/test_finalize_model_grads",
        "distributed/test_distributed_data_parallel",
        "pipeline_parallel/test_schedules",
    ),
    member_groups=True,
)
COLOCATED = Suite(
    num_ranks=8,
    modules=(f"{_MIMO}_colocated_correctness",),
    options=("-k", "mbs1"),  # those with more microbatches take minutes on a small machine
)
PAIRS = Suite(
    num_ranks=2,
    modules=("pipeline_parallel/test_multimodule_schedules", f"{_MIMO}_1f1b_schedule"),
)
ONE_RANK = Suite(
    num_ranks=1,
    modules=(
        "models/test_llava_model",
        "models/test_clip_vit_model",
        f"{_MIMO}_submodules",
        f"{_MIMO}_embedding_alignment",
        f"{_MIMO}_hetero_grid_args",
        f"{_MIMO}_hetero_runtime",
        f"{_MIMO}_mock_data",
        f"{_MIMO}_role",
        "distributed/test_param_and_grad_buffer",
        "test_parallel_state",
        "test_num_microbatches_calculator",
        "test_argument_utils",
        "test_checkpointing",
        "test_training",
    ),
)
SUITES = (COMMUNICATORS, MODULES, COLOCATED, PAIRS, ONE_RANK)


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """What tests run on.

    Args:
        checkout: Checkout of Megatron-LM.
        num_gpus: GPUs to use; without any the ranks run on CPU.
        logs: Folder that keeps what the ranks wrote; None keeps nothing.
    """

    checkout: Path
    num_gpus: int = 0
    logs: Path | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a test over all ranks.

    Args:
        result: ``"passed"``, ``"failed"`` or ``"skipped"``.
        reason: Why it failed, last line.
    """

    result: str
    reason: str = ""


Outcomes = dict[str, Outcome]  # by test


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """Outcomes of a suite without and with Mosaic."""

    suite: Suite
    without: Outcomes
    with_mosaic: Outcomes

    def broken(self) -> Iterator[tuple[str, str]]:
        """Yields tests that pass without Mosaic and do not with it, and the reason."""
        for test, outcome in self.without.items():
            other = self.with_mosaic.get(test, Outcome("failed", "it was not reached"))
            if outcome.result == "passed" and other.result != "passed":
                yield test, other.reason or other.result


def main(argv: Sequence[str] | None = None) -> int:
    """Runs all suites both ways and prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("checkout", type=Path, help="checkout of Megatron-LM")
    parser.add_argument("--only", default="", help="only modules whose path has this word")
    parser.add_argument("--logs", type=Path, help="keep what the ranks wrote in this folder")
    arguments = parser.parse_args(argv)
    if not (arguments.checkout / "tests" / "unit_tests").is_dir():
        parser.error(f"checkout={arguments.checkout} must hold tests/unit_tests")
    machine = Machine(checkout=arguments.checkout, num_gpus=_num_gpus(), logs=arguments.logs)
    comparisons = []
    for suite in SUITES:
        modules = tuple(module for module in suite.modules if arguments.only in module)
        if modules:
            comparisons.append(compare(suite, modules, machine))
    return report(comparisons)


def compare(suite: Suite, modules: Sequence[str], machine: Machine) -> Comparison:
    """Runs modules of a suite without and with Mosaic."""
    without, with_mosaic = (
        _run(suite, modules, machine, with_mosaic=choice) for choice in (False, True)
    )
    return Comparison(suite=suite, without=without, with_mosaic=with_mosaic)


def report(comparisons: Sequence[Comparison]) -> int:
    """Prints a row for each test module and what Mosaic breaks. Returns the exit status."""
    print(f"{'passed/failed/skipped':<50} ranks {'without':>12} {'with':>12}")
    for comparison in comparisons:
        without, with_mosaic = (
            _by_module(outcomes) for outcomes in (comparison.without, comparison.with_mosaic)
        )
        for module in without:
            counts = [_counts(side.get(module, Counter())) for side in (without, with_mosaic)]
            print(f"{module:<50} {comparison.suite.num_ranks:>5} {counts[0]:>12} {counts[1]:>12}")
    broken = [entry for comparison in comparisons for entry in comparison.broken()]
    for test, reason in broken:
        print(f"passes without Mosaic, not with it: {test}: {reason}")
    print(f"{len(broken)} tests pass without Mosaic and not with it")
    return 1 if broken else 0


def _by_module(outcomes: Outcomes) -> dict[str, Counter[str]]:
    counts: dict[str, Counter[str]] = {}
    for test, outcome in outcomes.items():
        module = test.partition("::")[0].removeprefix("tests/unit_tests/")
        counts.setdefault(module, Counter())[outcome.result] += 1
    return counts


def _counts(results: Mapping[str, int]) -> str:
    return "/".join(str(results.get(result, 0)) for result in ("passed", "failed", "skipped"))


def _num_gpus() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _run(suite: Suite, modules: Sequence[str], machine: Machine, *, with_mosaic: bool) -> Outcomes:
    num_ranks = min(suite.num_ranks, machine.num_gpus or suite.num_ranks)
    tests = [*suite.options, *(f"tests/unit_tests/{module}.py" for module in modules)]
    with _tree(machine.checkout) as tree, _folder(machine.logs) as folder:
        try:
            with redirect_stdout(io.StringIO()):
                run_ranks(
                    run_tests,
                    num_ranks,
                    *(str(tree), tests, str(folder), with_mosaic, suite.member_groups),
                    timeout_s=suite.timeout_s,
                    init=False,
                    fresh=machine.num_gpus > 0,
                )
        except RanksError as error:
            (folder / "error.txt").write_text(str(error))
            print(f"{modules[0]} and others: {str(error).splitlines()[0]}", file=sys.stderr)
        return read_outcomes(folder)


@contextmanager
def _tree(checkout: Path) -> Iterator[Path]:
    """Makes a folder that looks like the checkout without ``megatron``.

    Of the tests it holds the unit tests, and in place of a script that downloads data one that
    does not: the tests' ``conftest.py`` goes on without.
    """
    with tempfile.TemporaryDirectory(prefix="upstream-") as name:
        tree = Path(name)
        for entry in checkout.resolve().iterdir():
            if entry.name not in ("megatron", "tests") and not entry.name.startswith("."):
                (tree / entry.name).symlink_to(entry)
        scripts = tree / "tests" / "test_utils" / "python_scripts"
        scripts.mkdir(parents=True)
        for package in (tree / "tests", tree / "tests" / "test_utils", scripts):
            (package / "__init__.py").touch()
        (scripts / "download_unit_tests_dataset.py").write_text(
            "def download_and_extract_asset(assets_dir):\n"
            "    raise ImportError('nothing is downloaded')\n"
        )
        (tree / "tests" / "unit_tests").symlink_to(checkout.resolve() / "tests" / "unit_tests")
        yield tree


@contextmanager
def _folder(logs: Path | None) -> Iterator[Path]:
    if logs is None:
        with tempfile.TemporaryDirectory(prefix="outcomes-") as name:
            yield Path(name)
    else:
        logs.mkdir(parents=True, exist_ok=True)
        yield Path(tempfile.mkdtemp(dir=logs))


def read_outcomes(folder: Path) -> Outcomes:
    """Merges what the ranks wrote: a test failed if it did on any rank, or did not end."""
    merged: Outcomes = {}
    for path in sorted(folder.glob("rank*.jsonl")):
        for test, outcome in _read_rank(path).items():
            # In order of weight; a test that some ranks skip passes on the others.
            weights = ("skipped", "passed", "failed")
            known = merged.get(test, outcome)
            heavier = weights.index(outcome.result) > weights.index(known.result)
            merged[test] = outcome if heavier else known
    return merged


def _read_rank(path: Path) -> Outcomes:
    failed: Outcomes = {}
    outcomes: Outcomes = {}
    for line in path.read_text().splitlines():
        test, phase, result, reason = json.loads(line)
        outcomes.setdefault(test, Outcome("failed", "it did not end"))
        if result == "failed":
            failed[test] = Outcome(result, (reason.strip().splitlines() or [""])[-1])
        elif result == "skipped" or phase == "call":
            outcomes[test] = Outcome(result)
    return outcomes | failed


if __name__ == "__main__":
    sys.exit(main())
