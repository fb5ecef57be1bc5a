"""What lies in a folder of checkpoints, and whether it is whole.

Megatron writes ``metadata.json`` last, and trusts a checkpoint that has it. Tensors lie in the
files as zip archives with checksums, which torch writes and does not look at when it reads.
"""

import io
import json
import re
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal

from megatron.core.dist_checkpointing.core import CONFIG_FNAME
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata

_FOLDER = re.compile(r"iter_(\d{7,})$")
_TRACKER = "latest_checkpointed_iteration.txt"
_CHUNK_BYTES = 2**20
# What a damaged pickle can raise: its opcodes call whatever the flipped bits name.
_UNREADABLE = (
    OSError,
    UnpicklingError,
    EOFError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    AttributeError,
    ImportError,
    MemoryError,
)

Iteration = int | Literal["release"]


def folder_of(checkpoints: Path, iteration: Iteration) -> Path:
    """Returns where Megatron keeps the checkpoint of an iteration."""
    name = iteration if isinstance(iteration, str) else f"iter_{iteration:07d}"
    return checkpoints / name


def tracked_iteration(checkpoints: Path) -> Iteration | None:
    """Reads which checkpoint is the latest one; None if the file says nothing of use.

    Raises:
        FileNotFoundError: There is no such file.
    """
    text = (checkpoints / _TRACKER).read_bytes().decode(errors="replace").strip()
    if text == "release":
        return "release"
    return int(text) if text.isdecimal() else None


def is_tracked(checkpoints: Path) -> bool:
    """Whether something was ever saved here, as Megatron sees it."""
    return (checkpoints / _TRACKER).is_file()


def iterations_to_try(checkpoints: Path) -> list[Iteration]:
    """Lists the tracked checkpoint and those before it; if it is not there, all, latest first."""
    tracked = tracked_iteration(checkpoints)
    if tracked == "release":
        return ["release"]
    there = sorted(
        (int(match[1]) for path in checkpoints.iterdir() if (match := _FOLDER.match(path.name))),
        reverse=True,
    )
    return [each for each in there if tracked not in there or each <= tracked]


@dataclass(frozen=True, kw_only=True, slots=True)
class Item:
    """A tensor, or part of one, or an object, in a file of a checkpoint.

    Args:
        file: Name of the file in the checkpoint's folder.
        offset_bytes: Where it begins.
        length_bytes: How long it is.
    """

    file: str
    offset_bytes: int
    length_bytes: int


def read_index(folder: Path) -> Metadata:
    """Reads what a checkpoint holds and where.

    Raises:
        ValueError: It is incomplete or cannot be read; the message says what is wrong.
    """
    config = folder / CONFIG_FNAME
    if not config.is_file():
        raise ValueError(f"{CONFIG_FNAME}, which is written last, is missing")
    try:
        backend = json.loads(config.read_bytes())["sharded_backend"]
    except _UNREADABLE:
        raise ValueError(f"{CONFIG_FNAME} cannot be read") from None
    if backend != "torch_dist":
        raise ValueError(f"{CONFIG_FNAME} names format {backend}, not torch_dist")
    try:
        return FileSystemReader(folder).read_metadata()
    except _UNREADABLE:
        raise ValueError(".metadata cannot be read") from None


def items_of(index: Metadata) -> list[Item]:
    """Lists all that lies in files, in the order of files and offsets."""
    storage: dict[Any, Any] = index.storage_data or {}
    items = [
        Item(file=each.relative_path, offset_bytes=each.offset, length_bytes=each.length)
        for each in storage.values()
        # What a writer compressed is no archive.
        if not getattr(each, "transform_descriptors", None)
    ]
    return sorted(items, key=lambda item: (item.file, item.offset_bytes))


def find_short_file(folder: Path, items: Sequence[Item]) -> str | None:
    """Finds a file that is missing or ends too early; says so, or returns None."""
    needed: dict[str, int] = {}
    for item in items:
        end = item.offset_bytes + item.length_bytes
        needed[item.file] = max(needed.get(item.file, 0), end)
    for name, size_bytes in sorted(needed.items()):
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size < size_bytes:
            return f"{name} has {path.stat().st_size} of {size_bytes} bytes"
    return None


def find_damaged_item(folder: Path, items: Sequence[Item]) -> str | None:
    """Reads items and compares their checksums; says which file is damaged, or returns None."""
    for item in items:
        try:
            with (folder / item.file).open("rb") as file:
                _read_through(zipfile.ZipFile(_Slice(file, item)))
        except (*_UNREADABLE, zipfile.BadZipFile, NotImplementedError):
            return f"{item.file} is damaged at byte {item.offset_bytes}"
    return None


def _read_through(archive: zipfile.ZipFile) -> None:
    """Reads all members, which raises at a wrong checksum.

    A writer can do without checksums (``torch.serialization.set_crc32_options``): they are 0 then.
    """
    for member in archive.infolist():
        if member.CRC:
            with archive.open(member) as content:
                while content.read(_CHUNK_BYTES):
                    pass


class _Slice(io.RawIOBase):
    """An item of a file as a file of its own, read as it is asked for."""

    def __init__(self, file: io.BufferedReader, item: Item) -> None:
        self._file = file
        self._item = item
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._item.length_bytes}
        self._at = start[whence] + offset
        if self._at < 0:
            raise OSError("the place lies before the item")
        return self._at

    def readinto(self, buffer: Any) -> int:
        left = max(self._item.length_bytes - self._at, 0)
        self._file.seek(self._item.offset_bytes + self._at)
        content = self._file.read(min(len(buffer), left))
        buffer[: len(content)] = content
        self._at += len(content)
        return len(content)
