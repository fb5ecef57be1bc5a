"""One unit of work of a schedule."""

from typing import Literal, NamedTuple


class Task(NamedTuple):
    """Forward or backward pass of one stage of a module on consecutive microbatches.

    Encoders may take several microbatches in one task; the language model takes one.
    """

    kind: Literal["F", "B"]
    module: str
    stage: int
    microbatches: tuple[int, ...]

    def __str__(self) -> str:
        first, last = self.microbatches[0], self.microbatches[-1]
        span = f"{first}" if first == last else f"{first}-{last}"
        return f"{self.kind}{span} {self.module}.{self.stage}"
