"""Rates of kernels whose grid is made for the whole GPU: a stair, as a table of rates holds it."""

from math import ceil


def static_grid_rate(sms: int, *, num_sms: int) -> float:
    """Rate on some multiprocessors of a kernel with a block for each of all: in whole waves."""
    return 1 / ceil(num_sms / sms)
