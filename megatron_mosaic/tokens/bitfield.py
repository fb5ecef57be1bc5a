"""Masks written as one 64-bit word for every token, as Cornstarch has them.

Bit 0 of a word says that the token is text. Text sees those tokens at or before its own position
with which its word shares a bit; other tokens see those of the very same word, before and after.
Bits 62 and 63 mean nothing, and a word without any other bit is padding.

Source: Cornstarch, arXiv 2503.11367, and the semantics of its released kernel; packed documents
cannot be told apart in this format, for all text shares bit 0.
"""

import numpy as np

from megatron_mosaic.tokens.mask import NO_DOCUMENT, NO_GROUP, SequenceMask
from megatron_mosaic.tokens.ranges import Integers

_MEANINGFUL = (1 << 62) - 1
_IS_TEXT = 1


def mask_of_bitfield(words: Integers) -> SequenceMask:
    """Reads a mask from the words of a sequence.

    Args:
        words: One for each token ``[tokens]``, int64.
    """
    words = words & _MEANINGFUL
    last = np.flatnonzero(np.diff(words, append=~words[-1:]))
    word = words[last]
    is_text, is_padding = (word & _IS_TEXT) != 0, word == 0
    group = np.unique(word, return_inverse=True)[1].astype(np.int64)
    return SequenceMask(
        stops=last + 1,
        document=np.where(is_padding, NO_DOCUMENT, 0),
        group=np.where(is_text | is_padding, NO_GROUP, group),
        shown=word,
        sees=np.where(is_text, word, 0),
    )
