import pytest

from megatron_mosaic.schedule.clock import Clock


def drawn(clock, *, distance, num_microbatches):
    cells = {}
    for m in range(num_microbatches):
        cells[clock.forward_start(m, distance=distance)] = f"F{m}"
        for tick in range(
            clock.backward_start(m, distance=distance), clock.backward_end(m, distance=distance)
        ):
            assert tick not in cells
            cells[tick] = f"B{m}"
    return " ".join(f"{cells.get(tick, '.'):>2}" for tick in range(max(cells) + 1))


@pytest.mark.parametrize(
    ("distance", "expected"),
    [
        (2, "F0  .  . F1  .  . F2 B0 B0  . B1 B1  . B2 B2"),
        (1, " . F0  .  . F1 B0 B0 F2 B1 B1  . B2 B2"),
        (0, " .  . F0 B0 B0 F1 B1 B1 F2 B2 B2"),
    ],
)
def test_clock_of_three_stages_is_as_drawn(distance, expected):
    clock = Clock(depth=2, backward=True)

    assert drawn(clock, distance=distance, num_microbatches=3) == expected


def test_clock_without_backward_takes_one_tick_for_a_microbatch():
    clock = Clock(depth=2, backward=False)

    assert [clock.forward_start(m, distance=1) for m in range(3)] == [1, 2, 3]
