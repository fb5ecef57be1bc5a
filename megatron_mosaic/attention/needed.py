"""Which keys travel between context-parallel ranks: those that the queries of a rank see."""

from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from megatron_mosaic.tokens.assignment import SequenceCut, TokenAssignment
from megatron_mosaic.tokens.held import Held
from megatron_mosaic.tokens.mask import SequenceMask
from megatron_mosaic.tokens.ranges import Integers
from megatron_mosaic.tokens.tiles import needed
from megatron_mosaic.tokens.visible import VisibleKeys


def alone(mask: SequenceMask) -> TokenAssignment:
    """Gives all tokens of a sequence to a group of one rank."""
    length = max(mask.length, 1)
    cut = SequenceCut(length=length, cp=1, block=length)
    return TokenAssignment(cut=cut, owner=np.zeros(cut.num_pieces, dtype=np.int64))


@dataclass(frozen=True, kw_only=True, eq=False)
class NeededKeys:
    """The pieces of a sequence of which a rank has to have the keys.

    Args:
        assignment: Who keeps which piece.
        pieces: Whether some query of a rank sees some key of a piece, ``[cp, pieces]``.
    """

    assignment: TokenAssignment
    pieces: NDArray[np.bool_]

    @classmethod
    def of(cls, mask: SequenceMask, assignment: TokenAssignment) -> Self:
        """Finds them for every rank, the same on all."""
        cut, visible = assignment.cut, VisibleKeys.of(mask)
        pieces = np.zeros((cut.cp, cut.num_pieces), dtype=np.bool_)
        for rank in np.flatnonzero(assignment.tokens) if cut.cp > 1 else ():
            queries = assignment.held(int(rank))
            pieces[rank] = needed(mask, edges=cut.edges, queries=queries, visible=visible)
        return cls(assignment=assignment, pieces=pieces)

    def rows(self) -> Integers:
        """Tokens whose keys go from one rank to another, ``[receiver, sender]``."""
        cp = self.assignment.cut.cp
        sizes = np.where(self.pieces, self.assignment.cut.sizes, 0)
        rows = np.stack([sizes[:, self.assignment.owner == r].sum(axis=1) for r in range(cp)], 1)
        np.fill_diagonal(rows, 0)
        return rows

    def sent(self, sender: int, *, to: int) -> Held:
        """What one rank sends to another."""
        return self._held(self.pieces[to] & (self.assignment.owner == sender))

    def received(self, rank: int) -> Held:
        """What a rank receives from all others."""
        return self._held(self.pieces[rank] & (self.assignment.owner != rank))

    def _held(self, pieces: NDArray[np.bool_]) -> Held:
        edges = self.assignment.cut.edges
        return Held.of(edges[:-1][pieces], edges[1:][pieces])
