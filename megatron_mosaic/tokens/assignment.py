"""Which rank of a context-parallel group keeps which tokens of a sequence."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from megatron_mosaic.errors import LayoutError
from megatron_mosaic.tokens.held import Held
from megatron_mosaic.tokens.ranges import Integers


@dataclass(frozen=True, kw_only=True)
class SequenceCut:
    """Pieces of a sequence that ranks are given.

    Every rank has as many blocks as any other where an assignment wants it so, and what is too
    little for one more block each is cut into as many equal pieces as there are ranks.

        length = 11, cp = 2, block = 4     |0 1 2 3|4 5 6 7|8|9 10|

    Args:
        length: Tokens of the sequence.
        cp: Ranks of the group.
        block: Tokens of a block.

    Raises:
        LayoutError: A size is not positive.
    """

    length: int
    cp: int
    block: int

    def __post_init__(self) -> None:
        for name, size in (("length", self.length), ("cp", self.cp), ("block", self.block)):
            if size < 1:
                raise LayoutError(f"tokens: {name}={size} must be >= 1; pass what there is")

    @property
    def num_blocks(self) -> int:
        """Whole blocks, a multiple of the ranks."""
        return self.length // (self.cp * self.block) * self.cp

    @cached_property
    def edges(self) -> Integers:
        """Where pieces begin, and the length; ascending, no piece is empty."""
        blocks = np.arange(self.num_blocks + 1) * self.block
        rest = self.length - blocks[-1]
        ends = np.arange(1, self.cp + 1) * rest // self.cp
        return np.unique(np.concatenate((blocks, blocks[-1] + ends)))

    @property
    def num_pieces(self) -> int:
        """Blocks and smaller pieces."""
        return len(self.edges) - 1

    @property
    def sizes(self) -> Integers:
        """Tokens of each piece."""
        return np.diff(self.edges)


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenAssignment:
    """Who keeps which piece of a sequence. A rank has its tokens in the order of the sequence.

    Args:
        cut: The pieces.
        owner: Context-parallel rank of every piece.

    Raises:
        LayoutError: A piece has no rank of the group.
    """

    cut: SequenceCut
    owner: Integers

    def __post_init__(self) -> None:
        if len(self.owner) != self.cut.num_pieces:
            raise LayoutError(
                f"tokens: owner={len(self.owner)} must number the pieces={self.cut.num_pieces} of "
                f"the sequence; name one rank for each"
            )
        if len(self.owner) and not (self.owner.min() >= 0 and self.owner.max() < self.cut.cp):
            raise LayoutError(
                f"tokens: owner={self.owner.min()}..{self.owner.max()} must be in "
                f"0..{self.cut.cp - 1}; name ranks of the group"
            )

    @cached_property
    def tokens(self) -> Integers:
        """Tokens of each rank."""
        counts = np.bincount(self.owner, weights=self.cut.sizes, minlength=self.cut.cp)
        return counts.astype(np.int64)

    def local_length(self, *, multiple: int = 1) -> int:
        """Slots of every rank's tensors: those behind a rank's own tokens are padding.

        Args:
            multiple: What the slots must be a multiple of: the tensor-parallel size with sequence
                parallelism.
        """
        return -(-int(self.tokens.max()) // multiple) * multiple

    def held(self, rank: int) -> Held:
        """Positions that a rank of the group keeps."""
        own = self.owner == rank
        return Held.of(self.cut.edges[:-1][own], self.cut.edges[1:][own])
