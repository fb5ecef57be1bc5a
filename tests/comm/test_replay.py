import pytest

from megatron_mosaic.comm.replay import P2P, Issue, Part, ReplayError, Wait, replay
from megatron_mosaic.comm.traffic import received_bytes, total_received_bytes


def _all_reduce(index, *members, num_elements=4):
    return Issue(index, f"tp{list(members)}", members, "all_reduce", num_elements, num_elements * 4)


def _batch(index, *parts, name="p2p", members=(0, 1, 2)):
    parts = tuple(Part(kind, peer, size, size * 4) for kind, peer, size in parts)
    num_bytes = sum(part.num_bytes for part in parts)
    return Issue(index, name, members, P2P, None, num_bytes, parts)


def test_replay_accepts_collectives_in_one_order():
    record = [_all_reduce(0, 0, 1), Wait(0), _all_reduce(1, 0, 1, num_elements=8), Wait(1)]

    replay({0: record, 1: record})


def test_replay_rejects_collectives_of_different_sizes():
    with pytest.raises(ReplayError, match=r"rank 0 issued all_reduce \(4\).*rank 1 .*\(8\)"):
        replay({0: [_all_reduce(0, 0, 1)], 1: [_all_reduce(0, 0, 1, num_elements=8)]})


def test_replay_rejects_different_collectives_on_one_communicator():
    barrier = _all_reduce(0, 0, 1)._replace(operation="barrier", num_elements=None)

    with pytest.raises(ReplayError, match=r"rank 0 issued all_reduce .* rank 1 issued barrier"):
        replay({0: [_all_reduce(0, 0, 1)], 1: [barrier]})


def test_replay_rejects_waits_on_two_communicators_in_crossed_order():
    # Rank 0 waits for the first group before it joins the second, rank 1 the other way round.
    first, second = _all_reduce(0, 0, 1), _all_reduce(0, 1, 0)

    with pytest.raises(ReplayError, match=r"(?s)would hang:.*rank 0 waits for .*rank 1 waits for"):
        replay(
            {
                0: [first, Wait(0), second._replace(index=1), Wait(1)],
                1: [second, Wait(0), first._replace(index=1), Wait(1)],
            }
        )


def test_replay_accepts_two_communicators_in_crossed_order_without_waits_between():
    first, second = _all_reduce(0, 0, 1), _all_reduce(0, 1, 0)

    replay(
        {
            0: [first, second._replace(index=1), Wait(0), Wait(1)],
            1: [second, first._replace(index=1), Wait(0), Wait(1)],
        }
    )


def test_replay_rejects_a_send_and_a_receive_that_are_crossed_on_one_communicator():
    # Each rank sends first: without buffers neither send meets its receive.
    records = {
        0: [_batch(0, ("send", 1, 4)), _batch(1, ("recv", 1, 4))],
        1: [_batch(0, ("send", 0, 4)), _batch(1, ("recv", 0, 4))],
    }

    with pytest.raises(ReplayError, match=r"rank 0 has ended, .*\[send 1 \(4\)\] on p2p"):
        replay(records)


def test_replay_accepts_sends_and_receives_crossed_in_one_batch():
    replay(
        {
            0: [_batch(0, ("send", 1, 4), ("recv", 1, 2)), Wait(0)],
            1: [_batch(0, ("send", 0, 2), ("recv", 0, 4)), Wait(0)],
        }
    )


def test_replay_rejects_a_receive_of_another_size():
    with pytest.raises(ReplayError, match=r"rank 0 sends 4 elements .*rank 1 receives 5"):
        replay({0: [_batch(0, ("send", 1, 4))], 1: [_batch(0, ("recv", 0, 5))]})


def test_replay_completes_a_batch_part_by_part():
    # Rank 0's batch meets rank 1 long before rank 2, which first needs what rank 1 sends it.
    replay(
        {
            0: [_batch(0, ("send", 1, 4), ("send", 2, 4)), Wait(0)],
            1: [_batch(0, ("recv", 0, 4)), Wait(0), _batch(1, ("send", 2, 1), name="other")],
            2: [_batch(0, ("recv", 1, 1), name="other"), Wait(0), _batch(1, ("recv", 0, 4))],
        }
    )


def test_replay_rejects_a_member_that_never_joins():
    with pytest.raises(
        ReplayError, match=r"rank 0 waits for all_reduce .*at its heads: all_reduce"
    ):
        replay({0: [_all_reduce(0, 0, 1), Wait(0)], 1: []})


@pytest.mark.parametrize("position", range(3))
def test_replay_rejects_a_schedule_with_one_pair_of_batches_swapped(position):
    # Rank 0 sends four tensors of growing size down a link; rank 1 receives them in that order.
    sends = [_batch(m, ("send", 1, m + 1)) for m in range(4)]
    receives = [_batch(m, ("recv", 0, m + 1)) for m in range(4)]
    replay({0: sends, 1: receives})

    receives[position : position + 2] = receives[position : position + 2][::-1]

    with pytest.raises(ReplayError, match=rf"rank 0 sends {position + 1} elements"):
        replay({0: sends, 1: receives})


@pytest.mark.parametrize(
    ("operation", "expected"),
    [
        ("all_gather", 300),  # a share from each of three others
        ("reduce_scatter", 300),
        ("all_reduce", 150),  # 2 * 3/4 * 100
        ("all_to_all", 75),
    ],
)
def test_received_bytes_of_four_ranks(operation, expected):
    issue = Issue(0, "tp", (0, 1, 2, 3), operation, 25, 100)

    assert received_bytes(issue) == expected


def test_total_received_bytes_counts_what_is_received_and_not_what_is_sent():
    record = [_batch(0, ("send", 1, 7), ("recv", 1, 2), ("recv", 2, 3)), Wait(0)]

    assert total_received_bytes(record) == 20  # 5 elements of 4 bytes
    assert total_received_bytes(record, operation="all_reduce") == 0


def _in_lane(lane, index, *members):
    return _all_reduce(index, *members)._replace(communicator=f"{lane}{members}", lane=lane)


def test_replay_rejects_a_communicator_that_two_lanes_use():
    record = [
        _all_reduce(0, 0, 1)._replace(lane="vision"),
        _all_reduce(1, 0, 1)._replace(lane="language"),
    ]

    with pytest.raises(ReplayError, match=r"rank 0 uses tp\[0, 1\] from lanes vision and language"):
        replay({0: record, 1: record})


def test_replay_accepts_a_communicator_of_one_lane_between_steps():
    record = [_all_reduce(0, 0, 1)._replace(lane="vision"), Wait(0), _all_reduce(1, 0, 1), Wait(1)]

    replay({0: record, 1: record})


def test_replay_rejects_collectives_of_two_lanes_in_unlike_order():
    # In their own lanes on a GPU neither waits for the other; but each may fill what it has.
    vision, language = _in_lane("vision", 0, 0, 1), _in_lane("language", 1, 0, 1)
    first = [vision, Wait(0), language, Wait(1)]
    second = [language, Wait(1), vision, Wait(0)]

    with pytest.raises(ReplayError, match=r"unlike order: rank 0 .* vision, while rank 1 .* langu"):
        replay({0: first, 1: second})


def test_replay_accepts_reductions_that_go_on_beside_the_tasks_of_another_lane():
    gradients, language = _in_lane("vision", 0, 0, 1), _in_lane("language", 1, 0, 1)

    replay(
        {
            0: [gradients, language, Wait(1), Wait(0)],
            1: [language, Wait(1), gradients, Wait(0)],
        }
    )
