"""A few bytes in a file that ranks of the same machine can read when this one has died."""

import mmap
import os
import struct
import tempfile
from contextlib import suppress
from pathlib import Path

from megatron_mosaic.engine.progress import RECORD, Place

_SHARED_MEMORY = Path("/dev/shm")


class RecordFile:
    """Holds this rank's place in memory that other processes can map.

    Whoever survives the rank removes the file; its name is found from the rank's heartbeat.
    """

    def __init__(self, *, rank: int) -> None:
        folder = _SHARED_MEMORY if os.access(_SHARED_MEMORY, os.W_OK) else None
        file, self.path = tempfile.mkstemp(prefix=f"mosaic-rank{rank}-", dir=folder)
        os.truncate(file, RECORD.size)
        self.buffer = mmap.mmap(file, RECORD.size)
        os.close(file)

    def remove(self) -> None:
        """Removes the file; the memory stays this process's own."""
        remove_record(self.path)


def read_record(path: str) -> Place | None:
    """Reads the place of a rank of this machine; None if the file is not on this machine."""
    try:
        numbers = RECORD.unpack(Path(path).read_bytes())
    except (OSError, struct.error):
        return None
    return Place.from_numbers(numbers)


def remove_record(path: str) -> None:
    """Removes the file of a rank, if it is on this machine."""
    with suppress(OSError):
        os.unlink(path)
