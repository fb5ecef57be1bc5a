"""How context and sequence parallelism split a sequence over the ranks of a replica."""

from dataclasses import dataclass

from megatron_mosaic.errors import LayoutError
from megatron_mosaic.layout.placement import ModulePlacement
from megatron_mosaic.layout.rows import Interval, Rows


def splits_sequences(placement: ModulePlacement) -> bool:
    """Whether ranks of a replica each keep a part of every sequence."""
    return placement.context_parallel_size > 1 or placement.sequence_parallel


@dataclass(frozen=True, kw_only=True, slots=True)
class SequenceSharding:
    """Split of the language model's sequences, as Megatron makes it.

    Context parallelism cuts a sequence into ``2 * cp`` chunks and gives rank ``i`` the chunks
    ``i`` and ``2 * cp - 1 - i``, so that causal attention costs every rank the same. Sequence
    parallelism then cuts what a context-parallel rank has into ``tp`` consecutive parts.

    Args:
        sequence_length: Tokens of every sequence, text and other modalities together.
        cp: Context-parallel size.
        tp: Tensor-parallel size with sequence parallelism, else 1.

    Raises:
        LayoutError: The length cannot be split like that.
    """

    # Eight positions, cp = 2, tp = 2. Chunks of two: 0 and 3 on cp 0, 1 and 2 on cp 1.
    #
    # position     0   1   2   3   4   5   6   7
    # (cp, tp)    0,0 0,0 1,0 1,0 1,1 1,1 0,1 0,1

    sequence_length: int
    cp: int = 1
    tp: int = 1

    def __post_init__(self) -> None:
        multiple = self.tp * (2 * self.cp if self.cp > 1 else 1)
        if self.sequence_length % multiple:
            shown = f"{self.tp}*2*{self.cp}" if self.cp > 1 else f"{self.tp}"
            raise LayoutError(
                f"modules.language: sequence length={self.sequence_length} must be a multiple of "
                f"{shown}={multiple} (tensor-parallel size times twice the context-parallel one); "
                f"pad the sequences or change a size"
            )

    @classmethod
    def of(cls, placement: ModulePlacement, *, sequence_length: int) -> "SequenceSharding | None":
        """Returns how a placement splits sequences, or None if every rank keeps them whole.

        Raises:
            LayoutError: The length cannot be split like that.
        """
        if not splits_sequences(placement):
            return None
        tp = placement.tensor_model_parallel_size if placement.sequence_parallel else 1
        return cls(sequence_length=sequence_length, cp=placement.context_parallel_size, tp=tp)

    @property
    def local_length(self) -> int:
        """Positions that one rank keeps."""
        return self.sequence_length // (self.cp * self.tp)

    def positions(self, *, cp: int, tp: int) -> Rows:
        """Positions of a sequence that a rank keeps, in the order in which it has them.

        Args:
            cp: Context-parallel rank.
            tp: Tensor-parallel rank; 0 without sequence parallelism.
        """
        chunk = self.sequence_length // (2 * self.cp)
        last = 2 * self.cp - 1 - cp
        chunks = (
            Rows.of([Interval(0, self.sequence_length)])
            if self.cp == 1
            else Rows.of(Interval(i * chunk, (i + 1) * chunk) for i in (cp, last))
        )
        own = Interval(tp * self.local_length, (tp + 1) * self.local_length)
        return _part(chunks, own)


def _part(rows: Rows, own: Interval) -> Rows:
    """Rows at some places among ``rows``."""
    parts, before = [], 0
    for interval in rows:
        inside = Interval(before, before + interval.size).clip(own)
        parts.append(inside.shift(interval.start - before))
        before += interval.size
    return Rows.of(parts)
