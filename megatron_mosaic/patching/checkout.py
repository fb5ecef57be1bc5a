"""A checkout of Megatron-LM: what it is, and its files."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_mosaic.errors import HostError

_VERSION_FILE = "megatron/core/package_info.py"
_NUMBER = r"^{name} *= *(\d+)"


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkout:
    """A folder with Megatron-LM's sources; it need not be a git repository.

    Args:
        folder: The top folder.
        version: What the sources call themselves, ``x.y.z``, or ``unknown``.
    """

    folder: Path
    version: str

    def read(self, files: Iterable[str]) -> dict[str, bytes]:
        """Reads those of the files that are there.

        Raises:
            HostError: One cannot be read.
        """
        found = {}
        for file in files:
            path = self.folder / file
            if not path.exists():
                continue
            try:
                found[file] = path.read_bytes()
            except OSError as error:
                raise _refused(path, "readable", error) from None
        return found

    def write(self, contents: Mapping[str, bytes]) -> None:
        """Writes files that are there: all of them, or none.

        Raises:
            HostError: One cannot be written; the others are what they were.
        """
        former = self.read(contents)
        begun = []
        try:
            for file in contents:
                (self.folder / file).open("r+b").close()
            for file, content in contents.items():
                begun.append(file)
                (self.folder / file).write_bytes(content)
        except OSError as error:
            for file in begun:
                (self.folder / file).write_bytes(former[file])
            raise _refused(Path(error.filename or self.folder), "writable", error) from None


def open_checkout(folder: Path) -> Checkout:
    """Looks at a folder.

    Raises:
        HostError: It is not the top folder of Megatron-LM's sources.
    """
    if not folder.is_dir():
        raise HostError(
            f"patch: DIR={folder} must be a folder; give the top folder of a checkout of "
            f"Megatron-LM"
        )
    path = folder / _VERSION_FILE
    if not path.is_file():
        raise HostError(
            f"patch: DIR={folder} must hold {_VERSION_FILE}; give the top folder of a checkout of "
            f"Megatron-LM"
        )
    text = path.read_text(encoding="utf-8", errors="replace")
    numbers = [
        re.search(_NUMBER.format(name=name), text, flags=re.MULTILINE)
        for name in ("MAJOR", "MINOR", "PATCH")
    ]
    version = ".".join(number[1] for number in numbers if number) or "unknown"
    return Checkout(folder=folder, version=version)


def _refused(path: Path, what: str, error: OSError) -> HostError:
    return HostError(
        f"patch: file={path} must be {what}, not give '{error.strerror}'; nothing was changed, "
        f"give it the permission and run the command again"
    )
