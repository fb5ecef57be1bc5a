"""What ranks need of each other, and how it travels."""

import numpy as np
import pytest
import torch

from megatron_mosaic.attention.choice import blocks_s, cheaper_exchange
from megatron_mosaic.attention.needed import NeededKeys
from megatron_mosaic.attention.plan import _log_choice, _rank_plan, rank_plan
from megatron_mosaic.attention.wire import WireRows
from megatron_mosaic.cluster.spec import Curve, LinkTier
from megatron_mosaic.cost.collectives import Group
from megatron_mosaic.tokens.assignment import SequenceCut, TokenAssignment
from megatron_mosaic.tokens.presets import preset_mask

CPU = torch.device("cpu")
CUT = SequenceCut(length=8, cp=2, block=2)
IN_TURN = TokenAssignment(cut=CUT, owner=np.array([0, 1, 0, 1]))
CAUSAL = preset_mask("causal", length=8)
PACKED = preset_mask("multimodal_packed", length=8, document_stops=[4, 8])
EVERY = np.array([[0, 30, 30, 30], [30, 0, 30, 30], [30, 30, 0, 30], [30, 30, 30, 0]])


def test_ranks_need_the_blocks_before_their_own():
    needed = NeededKeys.of(CAUSAL, IN_TURN)

    # Rank 0 has tokens 0, 1, 4, 5 and lacks 2, 3; rank 1 lacks all four of rank 0.
    assert needed.rows().tolist() == [[0, 2], [4, 0]]
    assert [each.tolist() for each in needed.received(0)] == [[2], [4]]
    assert [each.tolist() for each in needed.sent(0, to=1)] == [[0, 4], [2, 6]]


def test_wire_has_samples_one_after_the_other():
    samples = [NeededKeys.of(mask, IN_TURN) for mask in (CAUSAL, PACKED)]

    first, second = (WireRows.of(samples, rank=rank, slots=5) for rank in range(2))

    # Row slot * 2 + sample. Of the packed sample rank 0 needs nothing and rank 1 all.
    assert (first.send_counts, first.send_rows.tolist()) == ([0, 8], [0, 2, 4, 6, 1, 3, 5, 7])
    assert (second.send_counts, second.send_rows.tolist()) == ([2, 0], [0, 2])
    assert (first.receive_counts, first.receive_rows.tolist()) == ([0, 2], [0, 2])
    assert second.receive_rows.tolist() == [0, 2, 4, 6, 1, 3, 5, 7]
    assert first.gathered_rows.tolist() == [10, 12]  # behind 5 slots of 2 samples of rank 0


def test_plan_of_equal_masks_is_derived_once():
    def plan(mask, slots=4):
        return rank_plan([mask], [IN_TURN], rank=0, slots=slots, device=CPU)

    first = plan(preset_mask("causal", length=8))

    assert plan(preset_mask("causal", length=8)) is first
    assert plan(PACKED) is not first
    assert plan(preset_mask("causal", length=8), slots=5) is not first


def test_plan_of_short_sequences_gives_ranks_without_tokens_nothing_to_do():
    cut = SequenceCut(length=1, cp=4, block=128)
    one = TokenAssignment(cut=cut, owner=np.array([2]))

    plan = rank_plan(
        [preset_mask("causal", length=1)], [one], rank=0, slots=1, device=CPU, wish="blocks"
    )

    assert plan.received is None


@pytest.mark.parametrize(("slots", "expected"), [(30, "all_gather"), (31, "blocks")])
def test_fewer_bytes_decide_where_links_are_unknown(slots, expected):
    # Every rank receives 3 * 30 rows; an all-gather brings 3 * 30 or 3 * 31.
    assert cheaper_exchange(EVERY, slots=slots) == expected


def tier(*, bytes_per_s, latency_s):
    return LinkTier(
        name="link",
        span=None,
        bandwidth_bytes_per_s=bytes_per_s,
        latency_s=latency_s,
        curve=Curve(peak_share=1.0),
    )


def test_all_gather_is_cheaper_where_a_node_would_send_blocks_twice():
    near, far = tier(bytes_per_s=1e3, latency_s=0.0), tier(bytes_per_s=10.0, latency_s=0.0)
    links = Group(size=4, near_size=2, near=near, far=far)

    # Blocks: 2 * 30 rows over 10 B/s of a rank. All-gather: 3 * 30 rows over 2 * 10 B/s.
    assert blocks_s(EVERY, links) == pytest.approx(6.0)
    assert cheaper_exchange(EVERY, slots=30, links=links) == "all_gather"
    # A third of the blocks takes 2 s, and an all-gather its 4.5 s.
    assert cheaper_exchange(EVERY // 3, slots=30, links=links) == "blocks"


def test_plan_goes_by_the_links_where_they_are_known():
    slow = tier(bytes_per_s=1.0, latency_s=0.0)
    links = Group(size=2, near_size=2, near=slow, far=slow)

    plans = [
        rank_plan([CAUSAL], [IN_TURN], rank=0, slots=slots, device=CPU, links=links)
        for slots in (4, 5)
    ]

    # Blocks: 4 rows to the busier rank, as many as an all-gather of 4 slots brings it.
    chosen = [plan.received.exchange for plan in plans if plan.received]
    assert chosen == ["all_gather", "blocks"]


def test_blocks_take_latency_and_the_time_of_the_busiest_rank():
    one = tier(bytes_per_s=10.0, latency_s=1.0)
    links = Group(size=4, near_size=4, near=one, far=one)

    assert blocks_s(EVERY * 0, links) == 0.0
    assert blocks_s(EVERY, links) == pytest.approx(1.0 + 90 / 10)


def test_choice_is_logged_once(caplog):
    _log_choice.cache_clear()
    _rank_plan.cache_clear()

    with caplog.at_level("INFO"):
        for slots in (4, 5, 6):
            rank_plan([CAUSAL], [IN_TURN], rank=0, slots=slots, device=CPU)

    # 4 rows are sent, and 4, 5 or 6 gathered.
    assert [record.getMessage() for record in caplog.records] == [
        "attention keys: auto -> all_gather: ranks gather all keys",
        "attention keys: auto -> blocks: the blocks that ranks need travel",
    ]
