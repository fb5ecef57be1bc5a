"""A transfer that was posted and may not be done."""

from collections.abc import Sequence
from typing import Protocol

import torch


class Pending(Protocol):
    """Handle of one posted transfer.

    Posting issues the transfer and waits for nothing. Whoever posted keeps the handle until
    ``finish`` has returned, because it keeps the buffers alive.
    """

    def wait(self) -> torch.Tensor:
        """Blocks until this rank's part has arrived. Returns what the rank keeps."""
        ...

    def buffers(self) -> Sequence[torch.Tensor]:
        """Returns this rank's memory that the transfer reads or writes, until it is waited for."""
        ...

    def is_done(self) -> bool:
        """Tells, without waiting, whether nothing of the transfer is under way any more."""
        ...

    def finish(self) -> None:
        """Blocks until nothing of the transfer needs this rank's buffers any more."""
        ...
