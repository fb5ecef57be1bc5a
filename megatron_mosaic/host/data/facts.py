"""What every rank knows of a sample, though only some ranks read it.

To let all ranks know more of a sample, add a field here and fill it in ``host/llava.py``.
"""

from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from typing import Self


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleFacts:
    """Facts of one sample; all ranks that read it must find the same.

    Args:
        images: Images of the sample.
        text_checksum: Of its token ids, so that ranks notice when they read unlike samples.
    """

    images: int
    text_checksum: int

    @classmethod
    def row_size(cls) -> int:
        """Number of int64 values of a row, the same for every sample."""
        return len(fields(cls))

    def row(self) -> tuple[int, ...]:
        """Values as they travel."""
        return astuple(self)

    @classmethod
    def from_row(cls, row: Sequence[int]) -> Self:
        """Inverse of :meth:`row`."""
        return cls(**{field.name: value for field, value in zip(fields(cls), row, strict=True)})
