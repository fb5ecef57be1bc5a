"""The least that the most loaded rank can have, as CP-SAT proves it."""

from itertools import pairwise
from typing import NamedTuple

import numpy as np
from ortools.sat.python import cp_model

from megatron_mosaic.tokens.ranges import Integers


class OptimalDeal(NamedTuple):
    """What the most loaded rank has: in the best deal that is found, and at least in any."""

    most: int
    bound: int


def optimal_deal(costs: Integers, cp: int, found: int, *, limit_s: float = 30.0) -> OptimalDeal:
    """Deals equally many blocks to every rank so that the most loaded one has least.

    Blocks of one cost are alike: what is decided is how many of each cost a rank has.

    Args:
        costs: Cost of each block; as many blocks as a multiple of the ranks.
        cp: Ranks.
        found: What the most loaded rank has in a deal that is known.
        limit_s: Seconds after which what is proven by then counts.
    """
    values, counts = np.unique(costs, return_counts=True)
    levels = list(zip(values.tolist(), counts.tolist(), strict=True))
    model = cp_model.CpModel()
    most = model.new_int_var(-(-int(costs.sum()) // cp), found, "most")
    taken = [
        [model.new_int_var(0, count, f"{value} of {rank}") for value, count in levels]
        for rank in range(cp)
    ]
    for row in taken:
        model.add(sum(row) == len(costs) // cp)
        model.add(cp_model.LinearExpr.weighted_sum(row, values.tolist()) <= most)
    for column, (_, count) in zip(zip(*taken, strict=True), levels, strict=True):
        model.add(sum(column) == count)
    for row, below in pairwise(taken):
        # Ranks are alike: those with more of the dearest come first.
        model.add(row[-1] >= below[-1])
    model.minimize(most)
    solver = cp_model.CpSolver()
    solver.parameters.num_workers = 1
    solver.parameters.random_seed = 0
    solver.parameters.max_time_in_seconds = limit_s
    status = solver.solve(model)
    bound = round(solver.best_objective_bound)
    if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        return OptimalDeal(found, bound)
    return OptimalDeal(round(solver.objective_value), bound)
