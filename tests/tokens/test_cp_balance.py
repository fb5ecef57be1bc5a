"""The committed numbers of the balance between ranks, and what counts them."""

import numpy as np

from benchmarks.balance_summary import numbers
from benchmarks.cp_balance import PUBLISHED_TILE, equal_tokens_bound, goal, kernel_tiles, keys
from benchmarks.machine import read_results
from benchmarks.summary import README
from megatron_mosaic.tokens.assignment import SequenceCut, TokenAssignment
from megatron_mosaic.tokens.mask import SequenceMask, text
from megatron_mosaic.tokens.visible import VisibleKeys


def committed(**wanted):
    rows = read_results("cp_balance")["rows"]
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def test_readme_has_the_committed_numbers():
    assert numbers() in README.read_text()


def test_committed_ratios_of_published_families_are_within_the_goal():
    rows = committed(generator="calibrated", tile="128x32", method="balanced")

    assert len(rows) == 4 * 5 * 5
    for row in rows:
        assert row["tokens_worst"] == 1.0
        if row["family"] in ("EP", "EE", "MP"):
            assert row["tiles_worst"] <= goal(row["cp"])


def test_committed_ratios_above_the_goal_are_what_the_mask_allows():
    for row in committed(generator="calibrated", tile="128x32", method="balanced"):
        for each in row["above_goal"]:
            assert each["tiles"] <= 1.003 * each["bound"]


def test_committed_local_assignment_receives_at_most_twice_the_keys_of_contiguous_ranks():
    (row,) = committed(generator="calibrated", method="local", cp=32, length=131072)

    assert row["tiles_worst"] <= 1.05
    assert row["tokens_worst"] <= 1.10
    assert row["of_contiguous_mean"] <= 2.0


def test_bound_of_one_block_that_costs_more_than_a_rank_should():
    # Of 4 ranks with 2 blocks the one with 90 has 1 beside it: 91 of a mean of 97 / 4.
    cut = SequenceCut(length=8, cp=4, block=1)
    costs = np.array([90, 1, 1, 1, 1, 1, 1, 1])
    assignment = TokenAssignment(cut=cut, owner=np.repeat(np.arange(4), 2))

    assert equal_tokens_bound(costs, assignment) == 91 / (97 / 4)


def test_counts_of_two_ranks_with_half_of_causal_text_each():
    # 4 rows of tiles with 4, 8, 12, 16 columns of 32 keys; rank 1 sees what rank 0 has.
    mask = SequenceMask.of([text(512)])
    visible = VisibleKeys.of(mask)
    cut = SequenceCut(length=512, cp=2, block=128)
    assignment = TokenAssignment(cut=cut, owner=np.array([0, 0, 1, 1]))

    assert kernel_tiles(mask, visible, assignment, PUBLISHED_TILE).tolist() == [12, 28]
    need, received = keys(mask, visible, assignment)
    assert (need.tolist(), received.tolist()) == ([256, 512], [0, 256])
