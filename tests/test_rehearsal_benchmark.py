from benchmarks.machine import read_results


def test_rehearsals_of_64_ranks_stay_within_their_limits():
    plans = read_results("rehearsal")["plans"]

    assert [(plan["world_size"], plan["ranks"]) for plan in plans] == [(8, 8), (64, 64), (512, 32)]
    assert all(plan["passed"] for plan in plans)
    assert max(plan["wall_s"] for plan in plans) < 300
    assert max(plan["peak_bytes"] for plan in plans) < 24 * 2**30
