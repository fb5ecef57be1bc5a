import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_mosaic.errors import PlanError
from megatron_mosaic.layout.ranks import parse_ranks, rank_spans, show_ranks


@pytest.mark.parametrize(
    ("written", "ranks"),
    [
        (3, (3,)),
        ("0-3", (0, 1, 2, 3)),
        ("5-5", (5,)),
        ([0, 2, "4-6"], (0, 2, 4, 5, 6)),
        (["4-5", "0-1"], (4, 5, 0, 1)),
        ([], ()),
    ],
)
def test_parse_ranks_reads_numbers_spans_and_lists(written, ranks):
    assert parse_ranks("ranks", written) == ranks


@pytest.mark.parametrize("written", ["", "0-", "-3", "0 - 3", "0:3", 1.0, True, None, [[0, 1]]])
def test_parse_ranks_refuses_other_forms(written):
    with pytest.raises(PlanError, match=r"^ranks=.* must be ranks: .*; write for example"):
        parse_ranks("ranks", written)


@pytest.mark.parametrize(
    ("ranks", "spans"),
    [
        ((7,), 7),
        ((0, 1, 2, 3), "0-3"),
        ((0, 2, 4, 6), [0, 2, 4, 6]),
        ((4, 5, 0, 1, 9), ["4-5", "0-1", 9]),
        ((3, 2, 1), [3, 2, 1]),
    ],
)
def test_rank_spans_are_the_shortest_form(ranks, spans):
    assert rank_spans(ranks) == spans


@given(st.lists(st.integers(0, 40)))
def test_rank_spans_are_read_back(ranks):
    assert parse_ranks("ranks", rank_spans(ranks)) == tuple(ranks)


def test_show_ranks_quotes_nothing():
    assert show_ranks((0, 1, 2, 5)) == "[0-2, 5]"
