"""The committed numbers, and the oracle that they are measured against."""

import json

import pytest

from benchmarks.layout_pairs import PAIRS, Pair, Side
from benchmarks.machine import RESULTS
from benchmarks.oracle import least_rows, rows_kept, rows_made, rows_of
from benchmarks.sharing_planner_summary import numbers as sharing_numbers
from benchmarks.summary import README, numbers


def test_readme_has_the_committed_numbers():
    assert numbers() in README.read_text()


def test_readme_has_the_committed_numbers_of_sharing():
    assert sharing_numbers() in README.read_text()


def test_bytes_are_the_least_but_for_padding():
    results = json.loads((RESULTS / "boundary_bytes.json").read_text())

    for pair in results["pairs"]:
        received, least = pair["mosaic"]["bytes"], pair["least_bytes"]
        # Gradients are gathered by the source's replicas, activations by the destination's.
        for way, tp in ((0, pair["tp_replicas"][1]), (1, pair["tp_replicas"][0])):
            padding = (tp - 1) * 8 * results["row_bytes"]
            assert least[way] <= received[way] <= least[way] + padding


def test_results_are_of_the_pairs_that_are_there():
    results = json.loads((RESULTS / "boundary_bytes.json").read_text())

    shown = [(pair["source"], pair["destination"], pair["items"]) for pair in results["pairs"]]
    assert shown == [(str(p.source), str(p.destination), list(p.items)) for p in PAIRS]


@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_oracle_gives_every_row_a_maker_and_a_keeper(pair):
    rows = set(range(len(rows_of(pair))))

    assert set().union(*(rows_made(pair, rank) for rank in pair.source.ranks)) == rows
    assert set().union(*(rows_kept(pair, rank) for rank in pair.destination.ranks)) == rows


def test_oracle_counts_what_a_rank_lacks():
    pair = Pair(source=Side(ranks=(0, 1), dp=2), destination=Side(ranks=(1, 2), tp=2), items=(1, 1))

    # Of 128 rows rank 1 makes the half and keeps all; of gradients only rank 0 lacks its 64.
    assert [least_rows(pair, rank) for rank in range(3)] == [(0, 64), (64, 0), (128, 0)]
