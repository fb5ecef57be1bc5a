"""How a checkout stands to a series: what is applied, what fits, and which hunk does not.

Git applies and reverts in a copy of the files, outside every repository. So a look changes
nothing, a fork may lie in the folder of another repository or in none, and a series that does not
fit as a whole leaves no half of itself behind.
"""

import os
import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_mosaic.errors import HostError
from megatron_mosaic.patching.checkout import Checkout
from megatron_mosaic.patching.series import Patch, Series

_FAILED = re.compile(r"^error: patch failed: (?P<file>.+):(?P<line>\d+)$", flags=re.MULTILINE)
# A repository's settings may change line ends or white space, and its variables where git looks.
_APPLY = ("git", "-c", "core.autocrlf=false", "apply", "--whitespace=nowarn")
_OF_REPOSITORIES = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_PREFIX")


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """Where a patch fits neither way.

    Args:
        file: File of the checkout.
        line: Line at which the hunk should begin; None if the file is missing.
        hunk: Number of the hunk in the patch's changes of the file, from 1.
    """

    file: str
    line: int | None = None
    hunk: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class PatchStanding:
    """How a checkout stands to one patch.

    Args:
        patch: The patch.
        state: ``"applied"``; ``"fits"``, it can be applied; or ``"fails"``.
        failure: Where it fails.
    """

    patch: Patch
    state: Literal["applied", "fits", "fails"]
    failure: Failure | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Standing:
    """How a checkout stands to a series.

    Args:
        series: The series.
        patches: Each of its patches.
        unpatched: Files without what is applied.
        patched: Files with all that fits.
    """

    series: Series
    patches: tuple[PatchStanding, ...]
    unpatched: Mapping[str, bytes]
    patched: Mapping[str, bytes]

    def of_state(self, state: str) -> list[PatchStanding]:
        """Patches of one state."""
        return [each for each in self.patches if each.state == state]


def choose_series(checkout: Checkout, every: Sequence[Series]) -> Standing:
    """Finds the series that the files of a checkout are made for.

    The files decide: the series of which most patches fit or are applied. Where two are alike,
    the version that the sources name does.

    Raises:
        HostError: No patch of any series fits; or git is not installed.
    """
    standings = [standing_of(checkout, series) for series in every]

    def fitness(standing: Standing) -> tuple[int, bool]:
        known = checkout.version.startswith(f"{standing.series.version}.")
        return -len(standing.of_state("fails")), known

    best = max(standings, key=fitness)
    if len(best.of_state("fails")) == len(best.patches):
        names = " or ".join(f"{each.name} ({each.version})" for each in every)
        raise HostError(
            f"patch: DIR={checkout.folder} must be Megatron-LM {names}, not {checkout.version}; "
            f"check out one of them, or start scripts by python -m megatron_mosaic.run"
        )
    return best


def standing_of(checkout: Checkout, series: Series) -> Standing:
    """Tries a series on a copy of a checkout's files: backwards, then forwards."""
    with _copied(checkout, series) as copy:
        applied = {
            patch.name
            for patch in reversed(series.patches)
            if _apply(patch, copy, "--reverse") is None
        }
        unpatched = copy.read(series.files)
        failures = {patch.name: _apply(patch, copy) for patch in series.patches}
        patched = copy.read(series.files)
    states = []
    for patch in series.patches:
        failure = failures[patch.name]
        state = "fails" if failure else "applied" if patch.name in applied else "fits"
        states.append(PatchStanding(patch=patch, state=state, failure=failure))
    return Standing(series=series, patches=tuple(states), unpatched=unpatched, patched=patched)


@contextmanager
def _copied(checkout: Checkout, series: Series) -> Iterator[Checkout]:
    with tempfile.TemporaryDirectory(prefix="mosaic-patch-") as name:
        copy = Checkout(folder=Path(name), version=checkout.version)
        for file, content in checkout.read(series.files).items():
            path = copy.folder / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        yield copy


def _apply(patch: Patch, copy: Checkout, *options: str) -> Failure | None:
    """Applies a patch to a copy. Returns where it fails; then the copy is as before."""
    for file in patch.files:
        if not (copy.folder / file).is_file():
            return Failure(file=file)
    environment = {key: value for key, value in os.environ.items() if key not in _OF_REPOSITORIES}
    environment |= {"GIT_CEILING_DIRECTORIES": str(copy.folder.parent), "LC_ALL": "C"}
    try:
        done = subprocess.run(
            [*_APPLY, *options, str(patch.path.resolve())],
            cwd=copy.folder,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
    except FileNotFoundError:
        raise HostError("patch: git= must be installed; install it") from None
    if done.returncode == 0:
        return None
    failed = _FAILED.search(done.stderr)
    if failed is None:
        words = " ".join(done.stderr.split())
        raise HostError(f"{patch.path}: git must apply it, not say '{words}'; install Mosaic again")
    file, line = failed["file"], int(failed["line"])
    return Failure(file=file, line=line, hunk=patch.hunk_number(file, line))
