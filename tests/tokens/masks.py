"""Masks that tests draw: any segments, also such as no preset makes."""

from hypothesis import strategies as st

from megatron_mosaic.tokens.mask import EVERYTHING, NO_GROUP, TEXT, Segment, SequenceMask, padding

CLASSES = (TEXT, 2, 4, TEXT | 2, 6, EVERYTHING)


@st.composite
def masks(draw, max_segments=8, max_length=24):
    """A sequence of at most ``max_segments`` segments of any kind."""
    document = 0
    segments = []
    for _ in range(draw(st.integers(1, max_segments))):
        length = draw(st.integers(1, max_length))
        if draw(st.integers(0, 7)) == 0:
            segments.append(padding(length))
            continue
        document += draw(st.sampled_from((0, 0, 0, 1, 2)))
        group = draw(st.sampled_from((NO_GROUP, NO_GROUP, 0, 1)))
        shown = draw(st.sampled_from((0, *CLASSES[:-1])))
        sees = draw(st.sampled_from((0, *CLASSES)))
        segments.append(Segment(length, document, group, shown, sees))
    return SequenceMask.of(segments)
