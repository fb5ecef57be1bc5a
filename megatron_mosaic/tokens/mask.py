"""The attention mask of one sequence, as the segments that it consists of.

A sequence is a list of segments, one after the other: stretches of text, images, padding. Tokens
of two documents never see each other. Inside a document

- a token sees the tokens of its own ``group`` in both directions, wherever they are: an image is
  a group, several images may be one, so is the prefix of a prefix language model;
- a token sees those tokens at or before its own position whose ``shown`` classes meet the classes
  that it ``sees``: text sees text and images before it, image tokens usually nothing but their
  group.

    segment    document  group  shown     sees            x sees
    ---------  --------  -----  --------  --------------  ------------------------------------
    text              0     --  TEXT      everything      all before it in document 0
    image             0      0  MODALITY  nothing         its own tokens
    text              0     --  TEXT      everything      all before it, the image too
    text              1     --  TEXT      everything      all before it in document 1
    padding          --     --  nothing   nothing         nothing, and nothing sees it
"""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from typing import Literal, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from megatron_mosaic.errors import LayoutError
from megatron_mosaic.tokens.ranges import Integers

TEXT = 1  # the class of text; modality m is shown as class 1 << (1 + m)
EVERYTHING = (1 << 62) - 1
NO_GROUP = -1
NO_DOCUMENT = -1

MAX_MODALITIES = 61

ModalitySees = Literal["own", "earlier_text", "earlier"]
"""What image tokens see beside their group: nothing, earlier text, or all that is earlier."""

_SEEN_BY_MODALITY = {"own": 0, "earlier_text": TEXT, "earlier": EVERYTHING}


class Kind(IntEnum):
    """What the tokens of a segment are to the mask."""

    PADDING = 0
    CAUSAL = 1
    GROUPED = 2


class Segment(NamedTuple):
    """Consecutive tokens that the mask treats alike.

    Attributes:
        length: Tokens.
        document: Which of the packed documents, ascending; ``NO_DOCUMENT`` for padding.
        group: Tokens of one group of a document see each other in both directions.
        shown: Classes as which its tokens are seen, one bit each.
        sees: Classes that its tokens see at or before their own position.
    """

    length: int
    document: int = 0
    group: int = NO_GROUP
    shown: int = TEXT
    sees: int = EVERYTHING


def text(length: int, *, document: int = 0) -> Segment:
    """Causal text, which sees everything before it."""
    return Segment(length, document)


def modality_tokens(
    length: int,
    *,
    group: int,
    document: int = 0,
    modality: int = 0,
    sees: ModalitySees = "own",
) -> Segment:
    """Tokens of an image, a video or a sound, which see each other in both directions.

    Args:
        length: Tokens.
        group: Number of the image in its document, or of the images that see each other.
        document: Document that they are in.
        modality: Number of the modality, below 61.
        sees: What they see beside their group.

    Raises:
        LayoutError: There are more modalities than classes.
    """
    if not 0 <= modality < MAX_MODALITIES:
        raise LayoutError(
            f"mask: modality={modality} must be in 0..{MAX_MODALITIES - 1}; "
            f"number the modalities of the model from 0"
        )
    return Segment(length, document, group, 1 << (1 + modality), _SEEN_BY_MODALITY[sees])


def padding(length: int) -> Segment:
    """Tokens that see nothing and that nothing sees."""
    return Segment(length, NO_DOCUMENT, NO_GROUP, 0, 0)


@dataclass(frozen=True, kw_only=True, eq=False)
class SequenceMask:
    """Who attends to whom in one sequence; one entry of every array for each segment.

    Args:
        stops: First position behind each segment; segments without tokens are left out.
        document: See :class:`Segment`, as what follows.
        group: Ditto.
        shown: Ditto.
        sees: Ditto.

    Raises:
        LayoutError: A segment ends before it begins, or documents are not in ascending order.
    """

    stops: Integers
    document: Integers
    group: Integers
    shown: Integers
    sees: Integers

    def __post_init__(self) -> None:
        lengths = np.diff(self.stops, prepend=0)
        if (lengths < 1).any():
            worst = int(np.argmax(lengths < 1))
            raise LayoutError(
                f"mask: length={lengths[worst]} of segment {worst} must be >= 1; leave out "
                f"segments without tokens, and do not let segments overlap"
            )
        documents = self.document[self.document != NO_DOCUMENT]
        if (documents < 0).any():
            raise LayoutError(
                f"mask: document={documents.min()} must be >= 0, or {NO_DOCUMENT} for padding; "
                f"number the documents of a sequence from 0"
            )
        backwards = np.flatnonzero(np.diff(documents) < 0)
        if len(backwards):
            before, after = documents[backwards[0]], documents[backwards[0] + 1]
            raise LayoutError(
                f"mask: document={after} must not come after document {before}; pack the "
                f"documents of a sequence one after the other, with ascending ids"
            )

    @classmethod
    def of(cls, segments: Iterable[Segment]) -> Self:
        """Builds a mask from segments in the order of the sequence.

        Raises:
            LayoutError: A length is negative, or documents are not in ascending order.
        """
        table = np.array([each for each in segments if each.length], dtype=np.int64)
        length, document, group, shown, sees = table.reshape(-1, 5).T.copy()
        return cls(stops=np.cumsum(length), document=document, group=group, shown=shown, sees=sees)

    @property
    def num_segments(self) -> int:
        """Segments of the sequence."""
        return len(self.stops)

    @property
    def length(self) -> int:
        """Tokens of the sequence, padding included."""
        return int(self.stops[-1]) if len(self.stops) else 0

    @cached_property
    def starts(self) -> Integers:
        """First position of each segment."""
        return np.concatenate(([0], self.stops[:-1])) if len(self.stops) else self.stops

    @property
    def kind(self) -> Integers:
        """:class:`Kind` of each segment."""
        kinds = np.where(self.group != NO_GROUP, Kind.GROUPED, Kind.CAUSAL)
        return np.where(self.document == NO_DOCUMENT, Kind.PADDING, kinds)

    def segments(self) -> tuple[Segment, ...]:
        """The segments one by one."""
        columns = (np.diff(self.stops, prepend=0), self.document, self.group, self.shown, self.sees)
        return tuple(Segment(*row) for row in np.stack(columns, axis=1).tolist())

    def of_tokens(self, positions: Integers) -> "TokenCodes":
        """What decides who sees whom, for some tokens of the sequence.

        Args:
            positions: Theirs, any shape; those outside of the sequence become padding.
        """
        segment = np.searchsorted(self.stops, positions, side="right")
        segment = np.where(positions >= 0, segment, self.num_segments)
        # Behind the last segment stands one of padding, for what is outside.
        return TokenCodes(
            position=positions,
            document=np.append(self.document, NO_DOCUMENT)[segment],
            group=np.append(self.group, NO_GROUP)[segment],
            shown=np.append(self.shown, 0)[segment],
            sees=np.append(self.sees, 0)[segment],
        )


class TokenCodes(NamedTuple):
    """What decides who sees whom, token by token; arrays of one shape."""

    position: Integers
    document: Integers
    group: Integers
    shown: Integers
    sees: Integers


def visible(query: TokenCodes, key: TokenCodes) -> NDArray[np.bool_]:
    """Whether queries see keys: the rule itself, for arrays that broadcast with each other.

    ``visible(codes[:, None], codes[None, :])`` is a dense mask; it is what every other form of a
    mask in this package is tested against.
    """
    same = (query.document == key.document) & (query.document != NO_DOCUMENT)
    together = (query.group == key.group) & (query.group != NO_GROUP)
    causal = (query.position >= key.position) & ((query.sees & key.shown) != 0)
    return same & (together | causal)


def dense(mask: SequenceMask) -> NDArray[np.bool_]:
    """The mask as a matrix ``[queries, keys]``, for short sequences and tests."""
    codes = mask.of_tokens(np.arange(mask.length))
    return visible(
        TokenCodes(*(each[:, None] for each in codes)),
        TokenCodes(*(each[None, :] for each in codes)),
    )
