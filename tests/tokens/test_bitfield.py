import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mosaic.tokens.bitfield import mask_of_bitfield
from megatron_mosaic.tokens.mask import dense

WORDS = (0, 1, 1 | 2, 1 | 4, 1 | 2 | 4, 2, 4, 2 | 4, 1 << 62, 1 << 62 | 1 | 2, 1 << 61, -1)


def sees(words, query, key):
    """The format's rule for one pair, as its description has it."""
    q, k = (int(words[place]) & ((1 << 62) - 1) for place in (query, key))
    if q & 1:
        return query >= key and q & k != 0
    return q == k and q > 0


@settings(max_examples=500, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(WORDS), st.integers(1, 4)), min_size=1, max_size=8))
def test_mask_of_words_follows_their_rule_pair_by_pair(runs):
    words = np.array([word for word, times in runs for _ in range(times)], dtype=np.int64)

    found = dense(mask_of_bitfield(words))

    places = range(len(words))
    assert found.tolist() == [[sees(words, query, key) for key in places] for query in places]


def test_text_sees_only_images_whose_bit_it_has():
    # One image of bit 1, one of bit 2, then text with bit 2 alone.
    mask = mask_of_bitfield(np.array([2, 4, 1 | 4]))

    assert dense(mask)[2].tolist() == [False, True, True]
