"""Clocks of lanes: which accesses are ordered, and which are a race."""

from megatron_mosaic.schedule.races import Race, VectorClocks


def test_clocks_report_an_access_that_no_event_orders():
    clocks = VectorClocks()

    assert clocks.access("vision", "rows", writes=True) is None
    assert clocks.access("language", "rows", writes=False) == Race("rows", "language", "vision")


def test_clocks_know_what_is_before_an_event_and_not_what_is_behind():
    clocks = VectorClocks()
    clocks.access("vision", "rows 0", writes=True)
    event = clocks.record("vision")
    clocks.access("vision", "rows 1", writes=True)
    clocks.wait("language", event)

    assert clocks.access("language", "rows 0", writes=True) is None
    assert clocks.access("language", "rows 1", writes=False) is not None


def test_clocks_pass_on_what_a_lane_has_waited_for():
    clocks = VectorClocks()
    clocks.access("audio", "rows", writes=True)
    clocks.wait("vision", clocks.record("audio"))
    clocks.wait("language", clocks.record("vision"))

    assert clocks.access("language", "rows", writes=True) is None


def test_clocks_let_lanes_read_the_same_and_report_the_write_behind():
    clocks = VectorClocks()

    assert clocks.access("vision", "weights", writes=False) is None
    assert clocks.access("language", "weights", writes=False) is None
    assert clocks.access("language", "weights", writes=True) == Race(
        "weights", "language", "vision"
    )
