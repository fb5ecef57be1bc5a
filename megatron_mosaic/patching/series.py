"""Patch series as they lie in ``patches/``: one folder for each version of Megatron-LM."""

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import megatron_mosaic
from megatron_mosaic.errors import HostError

_PACKAGE = Path(megatron_mosaic.__file__).parent
# As installed, and in a checkout of this repository.
_PLACES = (_PACKAGE / "patches", _PACKAGE.parent / "patches")
_TITLE = re.compile(r"^# Megatron-LM (?P<version>\d+\.\d+)\.\d+\b.*$")
_FILE = re.compile(r"^--- a/(?P<file>\S+)$", flags=re.MULTILINE)
_HUNK = re.compile(r"^@@ -(?P<line>\d+)(?:,\d+)? \+\d+(?:,\d+)? @@", flags=re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class Patch:
    """One patch.

    Args:
        path: File in the format of ``git format-patch``.
        text: What it says.
    """

    path: Path
    text: str

    @property
    def name(self) -> str:
        """Name of its file."""
        return self.path.name

    @cached_property
    def files(self) -> tuple[str, ...]:
        """Files that it changes, relative to the checkout."""
        return tuple(match["file"] for match in _FILE.finditer(self.text))

    def hunk_number(self, file: str, line: int) -> int:
        """Number of the hunk of a file that begins at a line of the old file, from 1."""
        _, _, rest = self.text.partition(f"--- a/{file}\n")
        own = rest.partition("\ndiff --git ")[0]
        lines = [int(match["line"]) for match in _HUNK.finditer(own)]
        return lines.index(line) + 1 if line in lines else 1


@dataclass(frozen=True, kw_only=True)
class Series:
    """The patches of one version, in the order in which they are applied.

    Args:
        name: Name of the folder.
        version: Version of Megatron-Core, ``major.minor``.
        patches: The patches.
    """

    name: str
    version: str
    patches: tuple[Patch, ...]

    @property
    def files(self) -> tuple[str, ...]:
        """Files that the patches change, each once."""
        return tuple(dict.fromkeys(file for patch in self.patches for file in patch.files))


def known_series() -> tuple[Series, ...]:
    """Reads all series that come with this package.

    Raises:
        HostError: The package was installed without them, or a series is not of the form.
    """
    for place in _PLACES:
        paths = sorted(place.glob("*/series"))
        if paths:
            return tuple(map(read_series, paths))
    raise HostError(f"patch: patches={_PLACES[0]} must hold series; install megatron-mosaic again")


def read_series(path: Path) -> Series:
    """Reads a file ``series``: a title with the version, then the name of a patch on each line.

    Raises:
        HostError: The title names no version, or a patch is missing.
    """
    title, *lines = path.read_text(encoding="utf-8").splitlines() or [""]
    found = _TITLE.match(title)
    if found is None:
        raise HostError(f"{path}: line 1={title!r} must be '# Megatron-LM x.y.z ...'; write it so")
    names = [line for line in lines if line.strip() and not line.startswith("#")]
    try:
        patches = [
            Patch(path=path.with_name(name), text=path.with_name(name).read_text(encoding="utf-8"))
            for name in names
        ]
    except OSError as error:
        raise HostError(
            f"{path}: patch={error.filename} must be readable, not give '{error.strerror}'; "
            f"install megatron-mosaic again"
        ) from None
    return Series(name=path.parent.name, version=found["version"], patches=tuple(patches))
